"""The docs site builds without a warning, its reference is complete, and its tables are true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from softmask_plugin import cli
from softmask_plugin.ablate.plan import Plan, Stage, read_plan
from softmask_plugin.ablate.table import Row, markdown, measure, range_table
from softmask_plugin.config import options
from softmask_plugin.config.run_options import RUN

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "examples" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
PLANS = {file.stem for file in (ROOT / "lavis_configs" / "ablation").glob("*.yaml")}
PUBLISHED = sorted({file.stem for file in (DOCS / "ablation").glob("*.json")} & PLANS)
ROW = re.compile(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>")


def table(page, head):
    """Lines of the page's tables whose first line starts with ``head``."""
    found = re.findall(rf"^{re.escape(head)}.*\n(?:\|.*\n)+", page.read_text(), re.M)
    assert found, f"{page.name} has no table {head}"
    return [line for each in found for line in each.splitlines()]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(  # without -q: it would hide warnings from --strict
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# ---- the site's reference


def test_the_reference_has_every_option_and_every_shipped_file(site):
    reference = (site / "yaml" / "options" / "index.html").read_text()
    for kind in vars(options).values():
        if is_dataclass(kind):
            assert all(f"<code>{field.name}</code>" in reference for field in fields(kind)), kind
    for folder in ("models", "datasets", "projects", "ablation"):
        page = (site / "yaml" / folder / "index.html").read_text()
        for file in (ROOT / "lavis_configs" / folder).rglob("*.yaml"):
            assert file.relative_to(ROOT).as_posix() in page


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
    assert sorted(re.sub("<.*?>", "", key) for key, _, _ in rows) == sorted(RUN)
    assert all(all(cells) for cells in rows), rows


def test_the_api_shows_public_docstrings(site):
    page = (site / "api" / "soft_mask" / "index.html").read_text()
    assert "Word-conditional Grad-CAM of a matching score." in page
    assert "normalize" in page and "_" + "mixed_targets" not in page
    assert (site / "api" / "models" / "pretrain" / "index.html").is_file()


def test_links_of_the_site_lead_to_the_reference(site):
    page = (site / "method" / "index.html").read_text()
    yaml_file = "lavis_configs/datasets/captions_folder/default.yaml"
    anchor = yaml_file.replace("/", "").replace(".", "")
    assert f'href="../yaml/datasets/#{anchor}"' in page and 'href="../yaml/options/"' in page
    assert f'id="{anchor}"' in (site / "yaml" / "datasets" / "index.html").read_text()
    assert 'href="../api/soft_mask/"' in page


# ---- the guides


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_yaml_file_in_a_command_is_shipped(page):
    named = re.findall(r"lavis_configs/[\w/]+\.yaml", page.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_command_has_its_row(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M)
    rows = re.findall(r"^\| `softmask (\w+)` \|", (DOCS / "commands.md").read_text(), re.M)
    assert rows and sorted(rows) == sorted(listed)


def test_the_method_has_every_switch_with_its_default():
    rows = [
        line for line in table(DOCS / "method.md", "| key in `model:`") if "`" in cells(line)[1]
    ]
    shown = {cells(row)[0].strip("`"): cells(row)[1].strip("`") for row in rows}
    sections = {
        "soft_mask": options.SoftMaskOptions,
        "itc": options.ItcOptions,
        "text": options.TextOptions,
    }
    defaults = {
        f"{section}.{field.name}": field.default
        for section, kind in sections.items()
        for field in fields(kind)
    }
    assert {key: yaml.safe_load(default) for key, default in shown.items()} == defaults


def test_the_training_guide_names_real_keys():
    keys = {cells(line)[0].strip("`") for line in table(DOCS / "training.md", "| key")}
    keys = {key.removeprefix("run.") for key in keys - {"key", "key in `run:", "---"}}
    assert {key for key in keys if not key.startswith("model.")} <= RUN.keys()


def test_the_tests_that_the_reliability_page_names_exist():
    named = re.findall(r"`(\w[\w/]*\.py)(?:::(\w+))?", (DOCS / "reliability.md").read_text())
    assert named
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), (file, test)


def test_the_keys_of_a_plan_are_explained():
    guide = (DOCS / "plans.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", guide, re.M))
    read = {each.name for kind in (Plan, Stage) for each in fields(kind)} - {"asked"}
    assert explained == read  # asked is what follows from them


def test_the_plan_of_the_guide_is_one(tmp_path):
    guide = (DOCS / "plans.md").read_text()
    (tmp_path / "mine.yaml").write_text(re.findall("```yaml\n(.*?)```", guide, re.S)[0])
    assert read_plan(tmp_path / "mine.yaml").metrics == ["retrieval txt_r1", "retrieval img_r1"]


# ---- numbers


@pytest.mark.parametrize("plan", PUBLISHED)
def test_the_published_tables_follow_from_the_published_numbers(plan):
    content = json.loads((DOCS / "ablation" / f"{plan}.json").read_text())
    values = {
        row["name"]: {name: metric["values"] for name, metric in row["metrics"].items()}
        for row in content["rows"]
    }
    against = values[content["baseline"]]
    rows = []
    for row in content["rows"]:
        own = {} if row["name"] == content["baseline"] else against
        measured = {n: measure(v, own.get(n, {})) for n, v in values[row["name"]].items()}
        rows.append(Row(**{**row, "metrics": measured}))
    metrics = [f"{stage['name']} {m}" for stage in content["stages"] for m in stage["metrics"]]
    page = (DOCS / "ablation_record.md").read_text().splitlines()
    rows = [replace(row, losses={}) for row in rows]  # they stand in the JSON alone
    lines = markdown(rows, metrics, content["baseline"]).splitlines()
    assert [line for line in lines if line.startswith("|") and line not in page] == []


def test_the_giveaway_table_follows_from_its_numbers():
    content = json.loads((DOCS / "ablation" / "giveaway.json").read_text())
    columns = "right right_soft_mask right_random_patches".split()
    columns += [column.replace("right", "wrong") for column in columns]
    rows = {
        name: {
            column.replace("_", ", ", 1).replace("_", " "): {
                seed: scores[column] for seed, scores in variant["seeds"].items()
            }
            for column in columns
        }
        for name, variant in content["variants"].items()
    }
    assert range_table(rows, digits=1) in (DOCS / "ablation_record.md").read_text()


def test_the_summary_of_the_ablation_follows_from_its_record():
    lines = table(
        DOCS / "ablation_record.md", "| variant | retrieval txt_r1 | retrieval img_r1 | foils"
    )
    named = dict(zip(cells(lines[0]), zip(*map(cells, lines[2:]), strict=True), strict=True))
    names = [name.strip("*") for name in named["variant"]]
    record = {k: dict(zip(names, column, strict=True)) for k, column in named.items()}
    columns = [
        "retrieval txt_r1",
        "foils acc",
        "curtain acc",
        "words pointing_gap",
        "entailment acc",
        "hidden right_colour",
        "hidden wrong_colour",
        "time of a step",
        "seeds",
    ]
    rows = [cells(line) for line in table(DOCS / "ablation.md", "| variant")[2:]]
    assert {row[0].split("`")[1] for row in rows} < {*names}
    for first, *values in rows:
        name = first.split("`")[1]
        for value, column in zip(values, columns, strict=True):
            told = record[column][name]
            if name != "no_mask" and "±" in value:
                told = told.partition("(")[2]  # the difference
            if value == "–":  # not measured, or with too few seeds for an interval
                assert "±" not in told.partition("(")[2]
            elif (name, value) != ("no_mask", "1"):
                assert value and told.startswith(value), (name, value, told)


def test_the_readme_quotes_the_tables_of_the_pages():
    readme = ROOT / "README.md"
    tasks = [line.replace("](", "](../") for line in table(readme, "| task |")]
    assert tasks == table(DOCS / "tasks.md", "| task | model |")
    ablation = table(DOCS / "ablation.md", "| variant")
    quoted = table(readme, "| variant")
    assert quoted[0] == ablation[0] and [line for line in quoted if line not in ablation] == []


def test_the_readme_quotes_measured_times():
    quoted = re.search(r"takes ([\d.]+) of the time .* re-ranking\s+([\d.]+)", readme_text(), re.S)
    page = (DOCS / "performance.md").read_text()
    assert quoted and all(f"| {ratio} (" in page for ratio in quoted.groups())


def readme_text():
    return (ROOT / "README.md").read_text()


def test_the_bundled_model_is_as_good_as_its_page_says():
    file = ROOT / "softmask_plugin" / "assets" / "scenes_tiny.json"
    found = json.loads(file.read_text())["held out"]
    page = " ".join((DOCS / "explain.md").read_text().split())
    retrieval, named = found["retrieval"], found["named"]["in a caption"]
    alone = found["named"]["alone"]
    assert f"{retrieval['txt_r1']}% of the images" in page
    assert f"{retrieval['img_r1']}% of the captions" in page
    assert (
        f"on the named thing for {named['own']:.0%}, on the other one for {named['other']:.0%} "
        f'(chance {named["chance"]:.0%}); of a phrase alone, such as "a red circle", for '
        f"{alone['own']:.0%} and {alone['other']:.0%}"
    ) in page


def test_the_gallery_quotes_its_measurements():
    found = json.loads((DOCS / "gallery" / "gallery.json").read_text())
    rows = [cells(line) for line in table(DOCS / "gallery.md", "| model | map |")[2:]]
    assert len(rows) == sum(len(each) - 2 for name, each in found.items() if name != "steps")
    for model, name, *values in rows:
        measured = found[model.lower().replace("-", "")][name.strip("`").removesuffix(" order")]
        own, other, *areas = measured.values()
        assert values == [f"{own:.0%}", f"{other:.0%}", *(f"{area:.2f}" for area in areas)]


def test_make_docs_builds_although_a_folder_has_its_name():
    command = ["make", "-n", "-o", ".venv/.installed", "docs"]
    assert "mkdocs build" in subprocess.check_output(command, cwd=ROOT, text=True)
