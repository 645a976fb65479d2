"""Every example, run as the newcomer runs it, in a small setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tasks

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `make tasks` leaves, after a few steps of each task."""
    folder = tmp_path_factory.mktemp("tasks")
    command = [sys.executable, "-m", "benchmarks.tasks", "--small", "--output", str(folder)]
    done = run(command, EXAMPLES.parent)
    for task in (*(task.name for task in tasks.TASKS), "grounding"):
        assert f"| {task} |" in done.stdout
    return folder


@pytest.fixture
def checkpoint(trained):
    return next(trained.glob("pretrain/*/checkpoint_0.pth"))


def run(command, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def example(name, folder, *arguments):
    """What an example prints, without the lines of LAVIS's log."""
    return run([sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)], folder).stdout


def test_score_pairs(checkpoint, tmp_path):
    lines = example("score_pairs", tmp_path, checkpoint).splitlines()[-6:]
    assert [line.partition(":")[0] for line in lines] == [
        *("text 0", "text 1", "text 2", "image 0", "image 1", "image 2")
    ]
    for line in lines[3:]:
        for cell in line.rpartition(": ")[2].split(", "):
            match, cosine = cell.rstrip(")").split(" (")
            assert 0 <= float(match) <= 1 and -1 <= float(cosine) <= 1


def test_search_folder(checkpoint, tmp_path):
    lines = example("search_folder", tmp_path, checkpoint, "a red circle").splitlines()[-5:]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    for line in lines:
        assert (tmp_path / line.split()[1]).is_file()
    folder = tmp_path / "outputs" / "scenes_images"
    again = example("search_folder", tmp_path, checkpoint, "a red circle", folder)
    assert again.splitlines()[-5:][0].split()[0] == lines[0].split()[0]


def test_explain_words(checkpoint, tmp_path):
    out = example("explain_words", tmp_path, checkpoint, tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 10_000
    assert "hidden: match" in out


def test_finetune_own_folder(tmp_path):
    options = ["run.max_epoch=1", "run.batch_size_train=100"]
    out = example("finetune_own_folder", tmp_path, "", "", "", *options)
    assert out.splitlines()[-1].startswith("text R@10")
    assert (tmp_path / "outputs" / "own" / "train.json").is_file()


def test_evaluate_tasks(trained, tmp_path):
    out = example("evaluate_tasks", tmp_path, trained)
    assert [line.partition(":")[0] for line in out.splitlines()[-5:]] == [
        *("retrieval", "entailment", "nlvr", "vqa", "grounding")
    ]


def test_custom_loss(tmp_path):
    out = example("custom_loss", tmp_path, "datasets.scenes_pretrain.num.train=320")
    assert out.splitlines()[-1].startswith("step 5: loss_itc")


def test_every_example_is_tested_and_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f"def test_{file.stem}(" in Path(__file__).read_text()
        assert f"`{file.name}" in listed
