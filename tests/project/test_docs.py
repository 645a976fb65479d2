"""The docs site builds without a warning, and its reference is whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from softmask_plugin.ablate.plan import PRETRAINED, Plan, Stage
from softmask_plugin.ablate.read import read_plan
from softmask_plugin.ablate.table import Row, markdown, measure
from softmask_plugin.config import options
from softmask_plugin.config.check import RUN_KEYS

ROOT = Path(__file__).parents[2]
PLANS = {file.stem for file in (ROOT / "lavis_configs" / "ablation").glob("*.yaml")}
PUBLISHED = sorted({file.stem for file in (ROOT / "docs" / "ablation").glob("*.json")} & PLANS)
ROW = re.compile(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_reference_has_every_option_and_every_shipped_file(site):
    reference = (site / "yaml" / "options" / "index.html").read_text()
    for kind in vars(options).values():
        if is_dataclass(kind):
            assert all(f"<code>{field.name}</code>" in reference for field in fields(kind)), kind
    for folder in ("models", "datasets", "projects", "ablation"):
        page = (site / "yaml" / folder / "index.html").read_text()
        for file in (ROOT / "lavis_configs" / folder).rglob("*.yaml"):
            assert file.relative_to(ROOT).as_posix() in page


@pytest.mark.parametrize("plan", PUBLISHED)
def test_the_published_tables_follow_from_the_published_numbers(plan):
    content = json.loads((ROOT / "docs" / "ablation" / f"{plan}.json").read_text())
    values = {
        row["name"]: {name: metric["values"] for name, metric in row["metrics"].items()}
        for row in content["rows"]
    }
    against = values[content["baseline"]]
    table = []
    for row in content["rows"]:
        own = {} if row["name"] == content["baseline"] else against
        measured = {n: measure(v, own.get(n, {})) for n, v in values[row["name"]].items()}
        table.append(Row(**{**row, "metrics": measured}))
    metrics = [f"{stage['name']} {m}" for stage in content["stages"] for m in stage["metrics"]]
    page = (ROOT / "docs" / "ablation.md").read_text().splitlines()
    lines = markdown(table, metrics, content["baseline"]).splitlines()
    assert [line for line in lines if line.startswith("|") and line not in page] == []


def test_every_option_has_a_meaning_and_every_section_a_link(site):
    page = (site / "yaml" / "options" / "index.html").read_text()
    rows = ROW.findall(page)
    own = [
        key for kind in vars(options).values() if is_dataclass(kind) for key in kind.__annotations__
    ]
    assert [re.sub("<.*?>", "", key) for key, _, _ in rows] == own
    assert all(all(cells) for cells in rows), rows
    links = re.findall('<a href="#(.*?)"', "".join(default for _, default, _ in rows))
    assert links and all(f'<h2 id="{link}">' in page for link in links)


def test_every_key_of_a_run_has_a_meaning(site):
    rows = ROW.findall((site / "yaml" / "run" / "index.html").read_text())
    assert sorted(re.sub("<.*?>", "", key) for key, _, _ in rows) == sorted(RUN_KEYS)
    assert all(all(cells) for cells in rows), rows


def test_the_keys_of_a_plan_are_explained():
    guide = (ROOT / "docs" / "plans.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", guide, re.M))
    read = {each.name for kind in (Plan, Stage) for each in fields(kind)} - {"asked"}
    assert explained == read  # asked is what follows from them
    assert f"`{PRETRAINED}/" in guide


def test_the_plan_of_the_guide_is_one(tmp_path):
    guide = (ROOT / "docs" / "plans.md").read_text()
    (tmp_path / "mine.yaml").write_text(re.findall("```yaml\n(.*?)```", guide, re.S)[0])
    assert read_plan(tmp_path / "mine.yaml").metrics == ["retrieval txt_r1", "retrieval img_r1"]


def test_the_api_shows_public_docstrings(site):
    page = (site / "api" / "soft_mask" / "index.html").read_text()
    assert "Word-conditional Grad-CAM of a matching score." in page
    assert "normalize" in page and "_" + "mixed_targets" not in page
    assert (site / "api" / "models" / "pretrain" / "index.html").is_file()


def test_make_docs_builds_although_a_folder_has_its_name():
    command = ["make", "-n", "-o", ".venv/.installed", "docs"]
    assert "mkdocs build" in subprocess.check_output(command, cwd=ROOT, text=True)
