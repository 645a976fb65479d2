"""TensorBoard, Weights & Biases, statistics and pictures of the masks while a run goes on."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_items import Pairs
from toys import RUN, ToyModel, ToyTask, build, interrupt, read_metrics

from benchmarks.traces import differences, trace
from softmask_plugin.errors import UserError
from softmask_plugin.host import environment
from softmask_plugin.models.vqa import SoftMaskVqa
from softmask_plugin.report import report_run
from softmask_plugin.runners import boards, panels
from softmask_plugin.runners.meter import mask_terms, queue_statistics


def board(folder):
    """What TensorBoard shows of a run: (step, value) by name, and steps of pictures by name."""
    events = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    )
    events.Reload()
    scalars = {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    pictures = {name: [e.step for e in events.Images(name)] for name in events.Tags()["images"]}
    return scalars, pictures


class PairTask(ToyTask):
    def valid_step(self, model, samples):
        raise NotImplementedError


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory, make_model):
    """A run of 12 steps of the pretraining model: ``pretraining(folder, **run)``."""

    def make(folder=None, **run):
        options = {"init_lr": 1e-3, "log_freq": 2, "resume_ckpt_path": "auto", **run}
        folder = folder or tmp_path_factory.mktemp("run")
        data = {"train": Pairs(24, 32)}
        return build(folder, PairTask(), make_model(), splits=data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PAIRS", 2)  # each takes a while to draw
        yield make


# ---- boards


def test_tensorboard_has_every_number_of_every_line(tmp_path):
    runner = build(tmp_path, valid_splits=["val"], test_splits=["test"])
    runner.train()
    scalars, _ = board(runner.output_dir)
    for split in ("train", "val", "test"):
        for line in read_metrics(runner.output_dir, split):
            for name in line.keys() - {"split", "epoch", "step", "time"}:
                points = [
                    (step, pytest.approx(value)) for step, value in scalars[f"{split}/{name}"]
                ]
                assert (line["step"], line[name]) in points
    names = {"loss", "loss_itc", "loss_itm", "lr", "temp", "pairs_per_s", "grad_norm"}
    assert {f"train/{name}" for name in names | {"skipped_steps"}} <= scalars.keys()
    assert "val/agg_metrics" in scalars and "train/epoch" not in scalars


def test_what_is_trained_again_after_a_kill_is_shown_once(tmp_path):
    options = {"resume_ckpt_path": "auto", "save_every_steps": 5, "log_freq": 1}
    folder = interrupt(build(tmp_path, **options), after=17)
    assert len(board(folder)[0]["train/loss"]) == 17
    time.sleep(1)  # TensorBoard orders files by the second in their names
    again = build(tmp_path, **options)
    again.train()
    assert again.output_dir == folder
    steps = [step for step, _ in board(again.output_dir)[0]["train/loss"]]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize("how", ["off", "missing", "broken"])
def test_runs_without_tensorboard(tmp_path, monkeypatch, caplog, how):
    if how == "missing":
        monkeypatch.setattr(boards, "find_spec", lambda name: None)
    if how == "broken":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    runner = build(tmp_path, tensorboard=how != "off")
    runner.train()
    assert not (runner.output_dir / "tensorboard").exists() and read_metrics(runner.output_dir)
    assert caplog.text.count("no TensorBoard") == (how == "broken")


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb that keeps what it is told."""
    module = ModuleType("wandb")
    module.told, module.lines, module.ended = {}, [], 0

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, line):
            module.lines.append(line)

        def finish(self):
            module.ended += 1

    def init(**told):
        module.told |= told
        return Run()

    module.init, module.Image = init, lambda path: Image.open(path).size
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(boards, "find_spec", lambda name: name == "wandb")
    return module


@pytest.mark.parametrize(("value", "project"), [(True, boards.PROJECT), ("mine", "mine")])
def test_weights_and_biases_where_asked_for(tmp_path, wandb, value, project):
    runner = build(tmp_path, wandb=value, valid_splits=["val"])
    runner.train()
    assert wandb.told["project"] == project and wandb.told["id"] == runner.output_dir.name
    assert wandb.told["config"] == runner.config.to_dict()
    steps = [line["step"] for line in wandb.lines]
    assert steps == [4, 8, 10, 10, 12, 16, 20, 20] and wandb.ended == 1
    assert {"train/loss", "train/lr"} <= wandb.lines[0].keys()
    assert wandb.lines[3].keys() == {"val/agg_metrics", "step"}


def test_weights_and_biases_that_do_not_start_are_one_line(tmp_path, wandb):
    def init(**_):
        raise RuntimeError("api_key not configured")

    wandb.init = init
    with pytest.raises(UserError, match="run.wandb: .*api_key not configured.*'wandb login'"):
        build(tmp_path, wandb=True).train()


def test_weights_and_biases_only_where_asked_for(tmp_path, wandb, monkeypatch):
    build(tmp_path, job_id="a").train()
    assert not wandb.told
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        build(tmp_path, job_id="b", wandb=True)


# ---- statistics


def test_mask_terms():
    even, one, none = [0.5] * 4, [1.0, 0, 0, 0], [0.0] * 4
    hidden = torch.tensor([even, one, none])
    keep = torch.nn.functional.pad(1 - hidden, (1, 0), value=1.0)
    found = mask_terms({"keep": keep, "word": torch.tensor([0, 2, -1])})
    assert found["mask_hidden"] == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert found["mask_spread"] == pytest.approx((1 + 0) / 2)
    assert found["mask_no_word"] == pytest.approx(1 / 3)
    empty = mask_terms({"keep": torch.ones(2, 5), "word": torch.tensor([-1, -1])})
    assert empty["mask_spread"] == 0 and all(math.isfinite(value) for value in empty.values())


def test_queue_statistics(make_model):
    model = make_model()
    found = queue_statistics(model, 6)
    assert found["queue_filled"] == 6 / 24
    assert 0 < found["queue_image_mean"] < 0.6
    model.text_queue[:] = model.text_queue[:, :1]
    collapsed = queue_statistics(model, 99)
    assert collapsed["queue_text_mean"] == pytest.approx(1) and collapsed["queue_filled"] == 1
    assert queue_statistics(make_model(queue_size=0), 6) == queue_statistics(ToyModel(), 6) == {}


def test_a_run_tells_of_its_masks_and_queues(pretraining):
    runner = pretraining()
    runner.train()
    lines = read_metrics(runner.output_dir)
    assert len(lines) == 6
    for line in lines:
        assert 0 < line["mask_hidden"] < 1 and 0 < line["mask_spread"] < 1
        assert line["mask_no_word"] == 0 and 0 < line["queue_image_mean"] <= 1
        assert line["queue_filled"] == min(1, 4 * line["step"] / 24)
    assert not runner._model._forward_hooks


# ---- pictures


WITH_PICTURES = {"panel_every": 4, "save_every_steps": 3}


@pytest.fixture(scope="module")
def pictured(pretraining):
    """The folder of a run that draws pictures, each of which takes a second."""
    runner = pretraining(**WITH_PICTURES)
    runner.train()
    return runner.output_dir


def test_pictures_after_every_so_many_steps_and_each_epoch(pictured):
    folder = pictured / "masks"
    assert sorted(file.name for file in folder.iterdir()) == [
        "pairs.pth",
        *sorted(f"step_{step}.png" for step in (4, 6, 8, 12)),
    ]
    assert board(pictured)[1] == {"masks": [4, 6, 8, 12]}
    assert (
        Image.open(folder / "step_4.png").tobytes() != Image.open(folder / "step_12.png").tobytes()
    )
    assert len(torch.load(folder / "pairs.pth", weights_only=True)["text_input"]) == panels.PAIRS


def test_pictures_and_boards_change_nothing_that_is_learnt(pretraining, pictured):
    plain = pretraining(tensorboard=False, save_every_steps=3)
    plain.train()
    assert not differences(trace(plain.output_dir), trace(pictured))


def test_an_interrupted_run_draws_the_same_pairs_and_ends_the_same(pretraining, pictured, tmp_path):
    folder = interrupt(pretraining(tmp_path, **WITH_PICTURES), after=9)
    again = pretraining(tmp_path, **WITH_PICTURES)
    again.train()
    assert again.output_dir == folder
    assert not differences(trace(pictured), trace(again.output_dir))
    for file in (pictured / "masks").glob("*.png"):
        assert file.read_bytes() == (again.output_dir / "masks" / file.name).read_bytes()


def test_a_picture_that_cannot_be_made_ends_no_run(pretraining, monkeypatch, caplog):
    def fail(*_):
        raise UserError("a heat map is NaN")

    monkeypatch.setattr(panels, "explain", fail)
    runner = pretraining(panel_every=6)
    with caplog.at_level(logging.WARNING):
        runner.train()
    assert "no picture of the masks after step 6: a heat map is NaN" in caplog.text
    assert runner.step == 12


def test_a_model_without_maps_is_refused(tmp_path, make_other):
    for model in (ToyModel(), make_other(SoftMaskVqa, bert={"layers": 8})):
        with pytest.raises(UserError, match="run.panel_every is 5, but the model has no matching"):
            build(tmp_path, model=model, panel_every=5)


# ---- what a run notes of its machine


def test_the_environment_is_noted(tmp_path):
    runner = build(tmp_path)
    runner.train()
    (noted,) = json.loads((runner.output_dir / "environment.json").read_text())
    assert noted["torch"] == torch.__version__ and noted["threads"] == torch.get_num_threads()
    assert noted["device"] == RUN["device"] and noted["processor"] and noted["processes"] == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_checkout_is_noted(tmp_path, monkeypatch):
    def own_version():
        return environment.environment(torch.device("cpu"))["softmask-plugin"]

    monkeypatch.setattr(environment, "PACKAGE", tmp_path / "softmask_plugin")
    assert own_version() == environment.version_of("softmask-plugin")  # no checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    asked = [*git, "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    for change in (["status", "-s"], ["pack-refs", "--all"], ["checkout", "-q", "--detach"]):
        subprocess.run([*git, *change], check=True)
        assert own_version().endswith(f"+{commit[:9]}"), change


def test_a_run_keeps_what_it_began_on_and_each_later_change(tmp_path, monkeypatch):
    device = torch.device("cpu")
    for version in ("1", "1", "2", "1"):
        monkeypatch.setattr(environment, "installed", lambda version=version: {"torch": version})
        environment.note_environment(tmp_path, device)
    assert [start["torch"] for start in environment.noted_environments(tmp_path)] == ["1", "2", "1"]
    (tmp_path / "metrics.jsonl").touch()
    assert "1, then 2, then 1" in report_run(tmp_path).read_text()


def test_a_run_that_goes_on_keeps_its_notes(tmp_path, monkeypatch):
    first = build(tmp_path, resume_ckpt_path="auto")
    first.train()
    monkeypatch.setattr(environment, "installed", lambda: {"torch": "9.9.9"})
    again = build(tmp_path, resume_ckpt_path="auto")
    again.train()
    assert again.output_dir == first.output_dir
    noted = environment.noted_environments(again.output_dir)
    assert [start["torch"] for start in noted] == [torch.__version__, "9.9.9"]
