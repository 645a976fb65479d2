"""Every example as a reader runs it, in a small setting."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from forks import forked
from PIL import Image

from benchmarks import tasks
from softmask_plugin import load_trained
from softmask_plugin.datasets.scenes import captions, make_scenes, render
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.explain.gallery import Gallery

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `make tasks` writes, after a few steps of each task."""
    folder = tmp_path_factory.mktemp("tasks #1")  # YAML would take # for a comment
    out = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", ["tasks", "--small", "--output", str(folder)])
        tasks.main()
    for task in (*(task.name for task in tasks.TASKS), "grounding"):
        assert f"| {task} |" in out.getvalue()
    return folder


@pytest.fixture
def checkpoint(trained):
    (file,) = trained.glob("pretrain/*/checkpoint_0.pth")
    return file


@pytest.fixture
def folder(tmp_path):
    """A user's folder: 16 noise images in colour, and caption files with a caption for each."""
    generator = np.random.default_rng(0)
    rows = [{"image": f"{i}.png", "caption": f"a red circle {i}"} for i in range(16)]
    for row in rows:
        pixels = generator.integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / row["image"])
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return tmp_path


def run(name: str, cwd: Path, *arguments: object) -> None:
    """Run a script in this process."""
    os.chdir(cwd)
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [name, *map(str, arguments)]
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def example(name: str, cwd: Path, *arguments: object) -> list[str]:
    """Run a script in its own process, a fork of this one; returns the lines that it prints."""
    done = forked(run, name, cwd, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def in_process(name: str, monkeypatch, cwd: Path, *arguments: object) -> None:
    """Run a script in this process: for variants of the tests above."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [])
    run(name, cwd, *arguments)


def test_score_pairs(checkpoint, tmp_path):
    lines = example("score_pairs", tmp_path, "--checkpoint", checkpoint)[-7:]
    for i in range(3):
        assert lines[i].startswith(f"text {i}: a ")
        assert lines[4 + i].startswith(f"image {i} ")
        cells = re.findall(r"([\d.]+) \(([+-][\d.]+)\)", lines[4 + i])
        assert len(cells) == 3
        assert all(0 <= float(match) <= 1 and -1 <= float(cosine) <= 1 for match, cosine in cells)


def test_search_folder(checkpoint, tmp_path):
    query = ("--query", "a red circle")
    lines = example("search_folder", tmp_path, "--checkpoint", checkpoint, *query)[-5:]
    scenes = make_scenes("test", 200)
    files = sorted(f"{captions(scene)[0].text}.png" for scene in scenes)
    rendered = {f"{captions(scene)[0].text}.png": render(scene, 60) for scene in scenes}
    found = Gallery(load_trained(checkpoint), map(rendered.get, files)).search(query[1], 5)
    for line, hit in zip(lines, found, strict=True):
        match, similarity, name = line.split(maxsplit=2)
        assert float(match) == pytest.approx(hit.match, abs=6e-4)
        assert float(similarity) == pytest.approx(hit.similarity, abs=6e-4)
        assert name == files[hit.index]


def test_search_your_own_folder(checkpoint, folder, monkeypatch, capsys):
    for name in range(3, 16):
        (folder / f"{name}.png").unlink()
    (folder / "1.png").rename(folder / "1.PNG")
    (folder / "in").mkdir()
    (folder / "2.png").rename(folder / "in" / "2.png")
    (folder / "3.png").write_bytes(b"cut off")
    in_process("search_folder", monkeypatch, folder, "--checkpoint", checkpoint, "--images", folder)
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "unreadable images left out: 1"
    found = [line.split()[2] for line in lines[1:]]
    assert sorted(found) == ["0.png", "1.PNG", "in/2.png"]
    (empty := folder / "empty").mkdir()
    given = ("--checkpoint", checkpoint, "--images", empty)
    with pytest.raises(SystemExit, match="no readable image in .*empty"):
        in_process("search_folder", monkeypatch, folder, *given)


def test_explain_words(checkpoint, tmp_path):
    figure = tmp_path / "a.png"
    lines = example("explain_words", tmp_path, "--checkpoint", checkpoint, "--output", figure)
    start = next(i for i, line in enumerate(lines) if ": match " in line)
    caption, rows = lines[start].partition(":")[0], lines[start + 1 : -1]
    assert [row.split()[0] for row in rows] == caption.split()
    assert all(0 <= float(row.split()[-1]) <= 1 for row in rows)
    pixels = np.asarray(Image.open(figure).convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):  # nothing is cut off
        assert (edge == 255).all()


def test_finetune_own_folder(checkpoint, folder):
    lines = example(
        *("finetune_own_folder", folder, "--checkpoint", checkpoint),
        *("--data", folder, folder / "train.json", folder / "test.json"),
        *("--options", "run.max_epoch=1", "run.batch_size_train=8", "run.warmup_steps=1"),
    )
    recalls = r"caption R@1 [\d.]+ \(R@10 [\d.]+\), image R@1 [\d.]+ \(R@10 [\d.]+\)"
    assert re.fullmatch(f"before: {recalls}", lines[-3])
    assert re.fullmatch(f"after: {recalls}", lines[-2])
    run = Path(lines[-1].partition(": ")[2])
    assert (run / "checkpoint_0.pth").is_file()
    assert str(checkpoint) in (run / "config.yaml").read_text()


def test_finetune_own_folder_renders_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = runpy.run_path(str(EXAMPLES / "finetune_own_folder.py"))
    images, *files = script["save_scenes"](tmp_path / "data")
    for file, count in zip(files, (2000, 200), strict=True):
        items = parse_captions(file)
        assert len(items) == count
        assert all((images / item["image"]).is_file() for item in items)
        assert all(len(item["caption"]) == 5 for item in items)


def test_evaluate_tasks(trained, tmp_path):
    names = [task.name for task in tasks.TASKS] + ["grounding"]
    few = ("--options", "run.k_test=4")  # candidates, which change neither form nor chance
    lines = example("evaluate_tasks", tmp_path, "--models", trained, *few)[-7:]
    assert lines[0].split() == ["task", "metric", "%", "chance"]
    cells = [line.split() for line in lines[1:]]
    assert [task for task, *_ in cells] == names
    assert all(0 <= float(score) <= 100 for _, _, score, _ in cells)
    chances = {task: float(chance) for task, _, _, chance in cells}
    # 2 of 1000 texts are right; labels are about equally frequent; one of two things is meant
    assert chances["retrieval"] == pytest.approx(0.2, abs=0.05)
    assert 33 < chances["entailment"] < 45 and 50 <= chances["nlvr"] < 56
    assert 0 < chances["vqa"] < 50 and chances["grounding"] == 50


def test_custom_loss(tmp_path):
    """This one in a fresh process, as a reader runs them all."""
    options = ["datasets.scenes_pretrain.num.train=320", "run.batch_size_train=32"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "custom_loss.py", "--options", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if ": loss_itc " in line]
    assert [line.partition(":")[0] for line in lines[-2:]] == ["step 5", "step 10"]
    assert len(losses) == 2 and losses[1] < losses[0]


SRUN = """#!/usr/bin/env bash
SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=16 exec "$@"
"""
PYTHON = """#!/usr/bin/env bash
trap 'echo USR1 >> signals; exit 75' USR1
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" > started
for _ in {1..200}; do [ -e code ] && exit "$(cat code)"; sleep 0.05; done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && printf 'first\\nsecond\\n' || echo "$*" >> requeued
"""


@pytest.mark.parametrize(("code", "again"), [(None, True), (75, True), (0, False), (2, False)])
def test_slurm(tmp_path, code, again):
    """With stand-ins for Slurm's commands: a signal (None), or a run that ends by itself."""
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_NODELIST": "nodes", "SLURM_JOB_ID": "7"}
    script = ["bash", str(EXAMPLES / "slurm.sh"), "run.seed=3"]
    job = subprocess.Popen(script, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # for the job's own trap
    job.send_signal(signal.SIGUSR1) if code is None else (tmp_path / "code").write_text(str(code))
    assert job.wait(30) == (75 if code is None else code)
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == "requeue 7\n" * again
    assert (tmp_path / "signals").exists() == (code is None)
    started = (tmp_path / "started").read_text()
    assert started.startswith(
        "3 1 16 first:29500 -m softmask_plugin.train --cfg-path lavis_configs"
    )
    assert started.endswith("run.resume_ckpt_path=auto run.save_every_steps=1000 run.seed=3\n")


def test_without_a_checkpoint_the_bundled_model_is_used(tmp_path, monkeypatch, capsys):
    in_process("score_pairs", monkeypatch, tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image ")]
    matches = [[float(x) for x in re.findall(r"([\d.]+) \(", row)] for row in rows]
    assert all(row[i] > 0.5 and row[i] == max(row) for i, row in enumerate(matches))


def test_without_models_one_line_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no model for retrieval in .*: run `make tasks` first"):
        in_process("evaluate_tasks", monkeypatch, tmp_path)


@pytest.mark.parametrize("file", [*EXAMPLES.glob("*.py")], ids=lambda file: file.stem)
def test_an_example_imports_the_plugin_before_lavis(file):
    """Without it LAVIS may not import, and knows none of the models; a fork would not notice."""
    imported = re.findall(r"^(?:import|from) (softmask_plugin|lavis)\b", file.read_text(), re.M)
    assert imported[0] == "softmask_plugin"


def test_every_example_is_tested_and_listed():
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f"def test_{file.stem}(" in tests
        assert f"python examples/{file.name}" in listed
        assert f"python examples/{file.name}" in file.read_text()
