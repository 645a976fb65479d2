"""softmask ablate: plans and their mistakes, runs that go on, the table and its arithmetic."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import scipy.stats
import torch
import yaml

from softmask_plugin import cli
from softmask_plugin.ablate import command, cost, losses, plot, table, workers
from softmask_plugin.ablate.plan import shipped_plans
from softmask_plugin.ablate.read import read_plan
from softmask_plugin.ablate.run import Job
from softmask_plugin.ablate.workers import Slot
from softmask_plugin.errors import UserError

SMALL = "lavis_configs/ablation/small.yaml"
SCENES = ("scenes", "scenes_tasks")
EVALUATE = "lavis_configs/projects/scenes/eval/retrieval_tiny.yaml"


def small_plan(**changes):
    """The content of the shipped trial, without its fine-tuning."""
    content = yaml.safe_load(shipped_plans()[SMALL].read_text())
    content["evaluate"] = content["evaluate"][:1]
    return {**content, **changes}


@pytest.fixture
def write(tmp_path):
    """Write a plan: ``write(seeds=[1], ...)`` returns its path."""

    def save(**changes):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(small_plan(**changes), sort_keys=False))
        return file

    return save


# ---- plans


def test_a_plan_says_what_each_run_is_given(write):
    variants = {"albef": [], "deep": ["model.bert.layers=6", "model.itc.gamma=1"]}
    given = ["run.num_workers=0", "datasets.scenes_retrieval.objects=1"]
    plan = read_plan(write(variants=variants, seeds=[3, 5, 7]), given, seeds=2)
    assert plan.name == "mine" and plan.seeds == (3, 5)
    assert plan.metrics == ["retrieval txt_r1", "retrieval img_r1"]
    pretrain, retrieval = plan.stages
    assert pretrain.train and not retrieval.train and retrieval.pretrained
    assert plan.options("deep", pretrain) == [*pretrain.options, *variants["deep"]]
    assert pretrain.options[-1] == given[0] and retrieval.options[-2:] == (*given,)
    # Other stages must have the model's shape, and nothing else of a variant's
    assert plan.options("deep", retrieval) == [*retrieval.options, "model.bert.layers=6"]


def test_the_plans_of_scenes_can_share_a_folder():
    evaluation, tasks = (read_plan(f"lavis_configs/ablation/{name}.yaml") for name in SCENES)
    assert tasks.base == evaluation.base and tasks.baseline == evaluation.baseline
    assert tasks.variants.items() <= evaluation.variants.items()
    names = [stage.name for plan in (evaluation, tasks) for stage in plan.evaluate]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes' of the plan: did you mean 'seeds'"),
        ({"base": {}}, "base has no 'config'"),
        ({"base": {"config": "nowhere.yaml"}}, "there is no file 'nowhere.yaml'"),
        ({"seeds": [1, 1]}, "list whole numbers, each once"),
        ({"seeds": 3}, "seeds is 3: it must be a list"),
        ({"baseline": "albf"}, "did you mean 'albef'"),
        ({"variants": []}, "variants must be a section"),
        ({"variants": {"albef": None}}, "variants.albef is None"),
        ({"variants": {"albef": [], "a/b": []}}, "'a/b' is no name"),
        ({"variants": {"albef": [], "b": ["run.max_epoch=9"]}}, "variants.b has another budget"),
        (
            {"variants": {"albef": [], "b": ["datasets.scenes_pretrain={num: {train: 9}}"]}},
            "datasets.scenes_pretrain.num.train is 9 instead of 16",
        ),
        ({"variants": {"albef": ["run.seed=3"]}}, "run.seed is for the plan's seeds to say"),
        ({"base": {"config": EVALUATE, "options": ["run.output_dir=x"]}}, "--output-dir to say"),
        ({"evaluate": []}, "evaluate is empty"),
        ({"evaluate": [{"name": "a", "config": EVALUATE, "metrics": []}]}, "metrics is empty"),
        ({"variants": {"albef": ["model.itc.gama=1"]}}, "did you mean 'gamma'"),
        ({"variants": {"albef": ["model.soft_mask.layer=3"]}}, "stage 'pretrain'"),
        ({"variants": {"albef": ["run.runner=runner_base"]}}, "run.runner must be softmask_runner"),
        ({"evaluate": [{"name": "a", "config": EVALUATE}]}, "has no 'metrics'"),
        ({"evaluate": [{"name": "a", "config": EVALUATE, "metrics": ["r1"]}]}, "metric 'r1'"),
        (
            {"evaluate": [{"name": "a", "config": EVALUATE, "metrics": ["txt_r1"]}] * 2},
            "two stages are called 'a'",
        ),
        ({"evaluate": [{"name": "a", "confg": EVALUATE}]}, "did you mean 'config'"),
        (
            {"evaluate": [{"name": "a", "config": EVALUATE, "metrics": ["txt_r1"], "train": 1}]},
            "it must be true or false",
        ),
    ],
)
def test_a_mistake_in_a_plan_gets_one_line(write, changes, message):
    file = write(**changes)
    with pytest.raises(UserError) as caught:
        read_plan(file)
    assert message in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variant_named_twice_is_told(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("variants:\n  a: []\n  a: []\n")
    with pytest.raises(UserError, match="not valid YAML.*duplicate key a"):
        read_plan(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "lavis_configs/ablation/scene.yaml"], "did you mean"),
        (["--plan", SMALL, "--only", "soft_msk"], "did you mean 'soft_mask'"),
        (["--plan", SMALL, "--baseline", "all"], "--baseline: the plan has no variant 'all'"),
        (
            ["--plan", SMALL, "--options", "datasets.scenes_pretrian.seed=1"],
            "did you mean 'scenes_pretrain'",
        ),
        (["--plan", SMALL, "--options", "run.seed=9"], "--options: remove 'run.seed=9'"),
        (["--plan", SMALL, "--seeds", "9"], "the plan has 2 seeds"),
        (["--plan", SMALL, "--jobs", "0"], "--jobs is 0"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line(arguments, message, capsys, tmp_path):
    assert cli.main(["ablate", *arguments, "--output-dir", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith("softmask: error: ") and message in error


# ---- runs


def test_an_ablation_goes_on_past_a_variant_that_fails_and_is_not_run_twice(
    write, tmp_path, capsys, monkeypatch
):
    bad = ["datasets.scenes_pretrain.objects=7"]  # which the data set refuses once it is built
    variants = {"albef": [], "bad": bad, "gamma": ["model.itc.gamma=1"]}
    plan, folder = write(variants=variants, seeds=[0]), tmp_path / "out"
    with pytest.raises(UserError, match="1 of 3 runs failed, first bad, seed 0: .*objects"):
        command.main(plan, folder, jobs=2)
    shown = capsys.readouterr().out
    assert "gamma, seed 0: retrieval, txt_r1" in shown and "Still to be measured: bad." in shown
    content = json.loads((folder / "mine.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert not rows["bad"]["metrics"] and rows["albef"]["cost"] is None
    low, median, high = rows["gamma"]["cost"]
    assert 0 < low <= median <= high
    assert [*rows["gamma"]["metrics"]["retrieval txt_r1"]["differences"]] == ["0"]
    assert rows["gamma"]["ran_on"][0]["torch"] == torch.__version__
    assert 0 < rows["gamma"]["losses"]["itm"]["0"] < math.inf and "| gamma | " in shown
    assert (folder / "mine.png").stat().st_size > 5000
    assert "softmask_plugin" not in shown  # what the runs print is in the workers' logs

    # All that is asked for is there: the table alone is written again
    monkeypatch.setattr(command, "work", None)
    page = (folder / "mine.md").read_text()
    (folder / "mine.md").unlink()
    assert command.main(plan, folder, only=["albef", "gamma"]).read_text() == page
    against = command.main(plan, folder, only=["albef"], baseline="gamma").read_text()
    assert "**gamma**" in against

    # What is there is of other options
    changed = ["model.soft_mask.strength=0.5"]
    with pytest.raises(UserError, match=r"another config or options.*--only gamma --again"):
        command.main(plan, folder, only=["gamma"], options=changed)
    with pytest.raises(TypeError):  # with --again it would be run
        command.main(plan, folder, only=["gamma"], options=changed, again=True)
    assert not [*(folder / "gamma").iterdir()] and (folder / "albef" / "seed_0").exists()


def done(job, value=50.0):
    """Write results of a job as if it had run."""
    log = job.place(job.plan.base) / "run" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"split": "train", "epoch": 0, "loss_itm": value / 100}))
    for stage in job.plan.stages:
        result = {"config": stage.config, "options": job.plan.options(job.variant, stage)}
        result |= {"metrics": dict.fromkeys(stage.metrics, value), "environment": {"cores": 2}}
        result["run"] = "run"
        job.place(stage).mkdir(parents=True, exist_ok=True)
        (job.place(stage) / "result.json").write_text(json.dumps(result))


def test_a_row_of_other_options_is_left_out_of_the_table(write, tmp_path):
    plan, changed = (
        read_plan(write(variants={"albef": [], "gamma": [f"model.itc.gamma={gamma}"]}))
        for gamma in (1, 2)
    )
    for seed in plan.seeds:
        done(Job(plan, "albef", seed, tmp_path), 40.0)
        done(Job(plan, "gamma", seed, tmp_path))
    albef, gamma = table.rows(plan, tmp_path, "albef")
    assert gamma.metrics["retrieval txt_r1"].difference == 10 and gamma.ran_on == [{"cores": 2}]
    albef, gamma = rows = table.rows(changed, tmp_path, "albef")
    assert albef.measured and not gamma.measured
    assert "Left out: " in table.markdown(rows, changed.metrics, "albef")
    assert "--only gamma --again" in table.markdown(rows, changed.metrics, "albef")
    # Without its baseline a row is still told
    _, gamma = table.rows(plan, tmp_path, "gamma")
    assert gamma.measured and gamma.metrics["retrieval txt_r1"].difference is None


def test_results_of_another_plan_are_not_thrown_away(write, tmp_path):
    plan = write(variants={"albef": []})
    other = tmp_path / "out" / "albef" / "seed_1" / "vqa"
    other.mkdir(parents=True)
    with pytest.raises(UserError, match="--again: .*seed_1 has results of another plan too.*vqa"):
        command.main(plan, tmp_path / "out", again=True)
    assert other.exists()


def test_ctrl_c_says_how_to_go_on(write, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "work", interrupt)
    with pytest.raises(UserError, match="interrupted: the same command goes on"):
        command.main(write(variants={"albef": []}), tmp_path / "out")


def test_a_step_is_timed_with_the_mask_on(write, tmp_path):
    variant = ["model.soft_mask.enabled=true", "model.soft_mask.start_iter=250"]
    plan = read_plan(write(variants={"albef": [], "late": variant}))
    stepper = cost.Stepper(plan, "late", tmp_path)
    assert stepper.runner._model.options.soft_mask.start_iter == 0
    assert stepper.seconds() > 0


def test_a_killed_ablation_goes_on(write, tmp_path):
    """The killed one's workers end with it, so that their runs can be taken up."""
    plan, folder = write(variants={"albef": []}), tmp_path / "out"
    asked = [sys.executable, "-m", "softmask_plugin.cli", "ablate", "--plan", str(plan)]
    asked += ["--output-dir", str(folder), "--jobs", "2"]
    first = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert first.stdout is not None
        assert "pretrain" in first.stdout.readline()
        first.send_signal(signal.SIGKILL)
        first.wait()
        until_no_process_is_left(first.pid)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    results = {file: file.stat().st_mtime_ns for file in folder.rglob("result.json")}
    assert 1 <= len(results) < 4
    done = subprocess.run(asked, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([*folder.rglob("result.json")]) == 4
    assert all(file.stat().st_mtime_ns == then for file, then in results.items())
    assert "| **albef** |" in (folder / "mine.md").read_text()


def until_no_process_is_left(group):
    """Wait until the group's processes are gone, or are zombies that nobody waits for."""
    for _ in range(100):
        listed = subprocess.run(
            ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True
        )
        if all(line.startswith("Z") for line in listed.stdout.split("\n") if line):
            return
        time.sleep(0.1)
    raise AssertionError(listed.stdout)


def test_one_process_per_cuda_device(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.slots(cuda=True, jobs=1) == [Slot(4, "0"), Slot(4, "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot.device for slot in workers.slots(cuda=True, jobs=1)] == ["3", "5"]
    assert workers.slots(cuda=False, jobs=3) == [Slot(2)] * 3
    assert workers.slots(cuda=False, jobs=99)[0] == Slot(1)


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_serve", die)
    job = Job(read_plan(SMALL), "albef", 0, tmp_path)
    ((told, error),) = workers.work([job], [Slot(1)], tmp_path)
    assert told is job and "died with exit code 9" in str(error) and "worker_0.log" in str(error)


def die(*_):
    os._exit(9)


# ---- the table


def test_the_arithmetic_of_a_row():
    found = table.measure({0: 3.0, 1: 5.0, 2: 10.0}, {0: 2.0, 1: 6.0, 3: 50.0})
    assert found.mean == 6 and found.deviation == pytest.approx(math.sqrt(13))
    assert found.differences == {0: 1.0, 1: -1.0} and (found.difference, found.wins) == (0.0, 1)
    alone = table.measure({0: 3.0}, {})
    assert alone.deviation is None and alone.difference is None and alone.interval is None


def test_the_interval_of_a_difference_is_that_of_a_paired_t_test():
    own, baseline = [3.0, 5.5, 10.0, 7.0], [2.0, 6.0, 7.5, 5.0]
    found = table.measure(dict(enumerate(own)), dict(enumerate(baseline)))
    low, high = scipy.stats.ttest_rel(own, baseline).confidence_interval(0.95)
    assert (low + high) / 2 == pytest.approx(found.difference)
    assert (high - low) / 2 == pytest.approx(found.interval)
    assert not found.tells  # 1.25 +- 2.1
    for offset in (9, -9):
        moved = {seed: value + offset for seed, value in enumerate(own)}
        assert table.measure(moved, dict(enumerate(baseline))).tells


def test_the_losses_that_a_run_ended_with_are_the_last_epochs(tmp_path):
    lines = [{"split": "train", "epoch": 0, "lr": 1, "loss_itm": 9.0}]
    lines += [{"split": "train", "epoch": 1, "lr": 1, "loss_itm": value} for value in (0.5, 0.3)]
    lines[-1]["loss_soft"] = 0.1  # a mask that began in between
    lines += [{"split": "test", "epoch": 1, "loss_itm": 7.0}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)))
    assert losses.last_losses(tmp_path) == {"itm": pytest.approx(0.4), "soft": 0.1}
    log.write_text("")  # killed before its first line
    assert losses.last_losses(tmp_path) == {}


def test_the_losses_in_markdown():
    lines = losses.losses_table({"albef": {"itm": {0: 0.1, 1: 0.3}}, "soft": {"soft": {0: 0.01}}})
    assert lines[2] == "| variant | itm | soft |"
    assert lines[4] == "| albef | 0.200 (0.100 to 0.300) |  |"
    assert lines[5] == "| soft |  | 0.010 |"


def rows_of(**values):
    """Rows with one metric, in percent, over seeds 0, 1, ...; the first is the baseline."""
    by_name = {name: dict(enumerate(row)) for name, row in values.items()}
    first, against = next(iter(by_name.items()))
    return [
        table.Row(
            name,
            (),
            {"r1": table.measure(row, {} if name == first else against)} if row else {},
            cost=None if name == first else [1.41, 1.5, 1.62],
        )
        for name, row in by_name.items()
    ]


def test_the_table_in_markdown():
    rows = rows_of(albef=[40.0, 42.0], soft=[44.0, 43.0], late=[])
    lines = table.markdown(rows, ["r1"], "albef").splitlines()
    assert lines[0] == "| variant | r1 | seeds | time of a step |"
    assert lines[2] == "| **albef** | 41.0 ± 1.4 | 2 |  |"
    # Student's t of one degree of freedom: 12.7 standard errors of 1.5
    assert lines[3] == "| soft | 43.5 ± 0.7 (+2.5 ± 19.1, 2/2) | 2 | 1.50 (1.41 to 1.62) |"
    assert lines[-1] == "Still to be measured: late."
    clear = table.markdown(rows_of(albef=[40, 42, 41], soft=[50, 52, 51.3]), ["r1"], "albef")
    assert "| soft | 51.1 ± 1.0 (**+10.1 ± 0.4**, 3/3) | 3 |" in clear
    assert "Of these 1 intervals about 0 would" in clear
    shares = table.markdown(rows_of(albef=[0.5], soft=[0.51]), ["r1"], "albef")
    assert "| soft | 0.510 (+0.010, 1/1) | 1 |" in shares


def test_the_plot_shows_differences_with_their_intervals():
    rows = rows_of(albef=[40, 42, 41], soft=[44, 43, 42], clear=[50, 52, 51.3], late=[])
    (axes,) = plot.draw(rows, ["r1"], "albef").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["albef", "soft", "clear"]
    assert axes.get_title(loc="left") == "r1, albef: 41"
    soft, clear = axes.containers
    for bar, row in ((soft, rows[1]), (clear, rows[2])):
        dot, _, (line,) = bar
        assert dot.get_xdata()[0] == pytest.approx(row.metrics["r1"].difference)
        (low, _), (high, _) = line.get_segments()[0]
        assert (high - low) / 2 == pytest.approx(row.metrics["r1"].interval)
    assert soft[0].get_color() != clear[0].get_color()  # whose interval leaves out zero
