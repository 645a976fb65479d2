"""LAVIS's own train.py and evaluate.py, by what they do (releases 1.0.2 and 2024-11-18)."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from lavis.common.registry import registry

import softmask_plugin.__main__ as script_runner
from softmask_plugin import launch
from softmask_plugin.errors import StartAgain
from softmask_plugin.runners import SoftmaskRunner, run_folder

SCRIPT = """
import argparse, random
import numpy as np
import torch
import lavis.tasks as tasks
from lavis.common.config import Config
from lavis.common.dist_utils import init_distributed_mode
from lavis.common.registry import registry
from lavis.common.utils import now
from lavis.runners.runner_base import RunnerBase

parser = argparse.ArgumentParser()
parser.add_argument("--cfg-path", required=True)
parser.add_argument("--options", nargs="+")
cfg = Config(parser.parse_args())
init_distributed_mode(cfg.run_cfg)
for seed in (random.seed, np.random.seed, torch.manual_seed):
    seed(cfg.run_cfg.seed)
task = tasks.setup_task(cfg)
made = {"job_id": now(), "task": task, "datasets": task.build_datasets(cfg)}
made["model"] = task.build_model(cfg)
"""
OWN = "registry.get_runner_class(cfg.run_cfg.get('runner', 'runner_base'))"
MAINS = {
    "evaluate.py": "print(RunnerBase(cfg=cfg, **made).evaluate(skip_reload=True))",
    "train.py": f"{OWN}(cfg=cfg, **made).train()",
}
SMALL = [
    *("datasets.scenes_retrieval.num.train=8", "datasets.scenes_retrieval.num.test=8"),
    *("run.batch_size_train=4", "run.batch_size_eval=4", "run.max_epoch=1", "run.log_freq=1"),
    *("run.valid_splits=[]", "run.test_splits=[test]", "run.k_test=8"),
]
EVALUATE = launch.find_config("scenes/eval/retrieval_tiny")
TRAIN = launch.find_config("scenes/train/retrieval_tiny")
BUNDLED = "model.model_type=scenes_tiny"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run one of the scripts: its exit code, and what it printed."""

    def run(name, config, *options):
        (tmp_path / name).write_text(SCRIPT + MAINS[name])
        given = [*SMALL, f"run.output_dir={tmp_path / 'runs'}", *options]
        arguments = [str(tmp_path / name), "--cfg-path", str(config), "--options", *given]
        monkeypatch.setattr(sys, "argv", ["-m", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        for path in ("output_dir", "result_dir"):
            registry.mapping["paths"].pop(path, None)
        code = script_runner.main()
        return code, capsys.readouterr()

    yield run
    for folder in list(run_folder._held):
        run_folder.release(folder)


def test_evaluate_takes_the_runner_and_the_weights_that_are_named(run, tmp_path):
    code, printed = run("evaluate.py", EVALUATE, BUNDLED)
    assert code == 0, printed.err
    (folder,) = (tmp_path / "runs").iterdir()
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    theirs = json.loads(line)
    options = [*SMALL, f"run.output_dir={tmp_path / 'ours'}", BUNDLED]
    _, ours = launch.run(EVALUATE, options, evaluate=True)
    assert {key: theirs[key] for key in ours["test"]} == pytest.approx(ours["test"])


def test_train_loads_the_weights_of_a_type_among_the_options(run, tmp_path):
    code, printed = run("train.py", TRAIN, BUNDLED, "run.init_lr=0", "run.min_lr=0")
    assert code == 0, printed.err
    (file,) = (tmp_path / "runs").glob("*/checkpoint_0.pth")
    found = torch.load(file, weights_only=True)["model"]["vision_proj.weight"]
    bundled = launch.open_checkpoint("shipped:scenes_tiny").state["vision_proj.weight"]
    torch.testing.assert_close(found, bundled.float())


def test_train_ends_by_a_signal_as_the_command_does(run, tmp_path, monkeypatch, caplog):
    step = SoftmaskRunner.train_step

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        step(*args)

    monkeypatch.setattr(SoftmaskRunner, "train_step", signalled)
    with caplog.at_level("INFO"), pytest.raises(StartAgain) as stop:
        run("train.py", TRAIN, "run.resume_ckpt_path=auto")
    assert stop.value.code == 75
    (line,) = (text for text in caplog.messages if text.startswith("ended after step 1"))
    assert "by SIGTERM: the same command with run.resume_ckpt_path=auto goes on from" in line
    assert list((tmp_path / "runs").glob("*/checkpoint_0_1.pth"))


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        ("evaluate.py", EVALUATE, [], "there are no weights to evaluate: set model.pretrained"),
        ("evaluate.py", TRAIN, [], "there are no weights to evaluate: set model.pretrained"),
        ("train.py", EVALUATE, [], "there are no weights to evaluate: set model.pretrained"),
        ("train.py", TRAIN, ["model.finetuned=a.pth"], "model.finetuned would not be loaded"),
        ("train.py", TRAIN, ["model.model_type=tyni"], "unknown type 'tyni' of SoftMaskRetrieval"),
        ("train.py", TRAIN, ["run.runner=runner_base"], "'runner_base', which works with CUDA"),
        ("evaluate.py", TRAIN, ["run.runner=runner_iter"], "'runner_iter', which works with CUDA"),
    ],
)
def test_what_cannot_work_is_one_line(run, name, config, options, message):
    code, printed = run(name, config, *options)
    assert code == 2
    line = printed.err.splitlines()[-1]
    assert f"{name}: error: " in line and message in line
    assert "Traceback" not in printed.err
    registered = registry.get("configuration", no_warning=True)
    assert registered is None or registered.config  # no half of one, which others would read
