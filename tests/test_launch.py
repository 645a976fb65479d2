"""``launch.run``: which folder a run gets, and what it leaves open."""

from __future__ import annotations

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import pytest

from softmask_plugin import launch
from softmask_plugin.errors import UserError
from softmask_plugin.runners import run_folder

TRAIN = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"


@pytest.fixture
def options(tmp_path):
    return [
        f"run.output_dir={tmp_path}",
        "run.max_epoch=1",
        "run.batch_size_train=4",
        "run.batch_size_eval=4",
        "datasets.scenes_pretrain.num.train=8",
        "run.valid_splits=[]",
        "run.test_splits=[]",
        "run.num_workers=0",
    ]


def test_evaluation_leaves_the_training_run_alone(tmp_path, options):
    """Whether the command or the option asks for it, and although the option asks to resume."""
    trained, _ = launch.run(TRAIN, options)
    names = ("metrics.jsonl", "config.yaml", "log.txt")
    before = {name: (trained.output_dir / name).read_bytes() for name in names}
    given = [*options, "run.resume_ckpt_path=auto", "run.evaluate=true"]
    evaluated, _ = launch.run(TRAIN, given)
    assert evaluated.output_dir != trained.output_dir
    assert {name: (trained.output_dir / name).read_bytes() for name in names} == before


def test_a_run_leaves_nothing_open(options):
    evaluated, _ = launch.run(TRAIN, [*options, "run.evaluate=true"])
    evaluated.log._boards.write({"split": "test", "loss": 1.0})  # opens TensorBoard
    evaluated.evaluate(skip_reload=True)
    assert evaluated.output_dir not in run_folder._held
    assert evaluated.log._boards._boards is None


def test_a_run_that_cannot_start_lets_its_folder_go(tmp_path, options):
    with pytest.raises(UserError, match="no tokenizer"):
        launch.run(TRAIN, [*options, "model.tokenizer=missing.txt"])
    assert not any(folder.parent == tmp_path for folder in run_folder._held)
