"""softmask ablate: plans and their mistakes, runs that go on, the table and its arithmetic."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import yaml

from softmask_plugin import cli, launch
from softmask_plugin.ablate import command, cost, losses, plot, run, table, workers
from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import shipped_plans
from softmask_plugin.ablate.read import read_plan
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
        ({"seeds": [-1]}, "seeds is -1: it must be a whole number in [0, 4294967295]"),
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
            {
                "evaluate": [
                    {
                        "name": "a",
                        "config": EVALUATE,
                        "metrics": ["txt_r1"],
                        "options": ["run.test_splits=[val,test]"],
                    }
                ]
            },
            "run.test_splits is ['val', 'test']: name the one to measure",
        ),
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
    with pytest.raises(UserError, match=r"strength = unset, but .* 0.5: .*--only gamma --again"):
        command.main(plan, folder, only=["gamma"], options=changed)
    with pytest.raises(TypeError):  # with --again it would be run
        command.main(plan, folder, only=["gamma"], options=changed, again=True)
    assert not [*(folder / "gamma").iterdir()] and (folder / "albef" / "seed_0").exists()


def done(job, value=50.0):
    """Write results of a job as if it had run."""
    for stage in job.plan.stages:
        result = {"metrics": dict.fromkeys(stage.metrics, value), "environment": {"cores": 2}}
        result["losses"] = {"itm": value / 100}
        job.place(stage).mkdir(parents=True)
        for name, content in (("asked", job.asked(stage)), ("result", result)):
            (job.place(stage) / f"{name}.json").write_text(json.dumps(content))


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


def test_a_result_counts_for_the_whole_configuration_that_it_is_of(write, tmp_path):
    """Not for the name of its YAML file: that may have changed since."""
    plan = read_plan(write(variants={"albef": []}, seeds=[1]))
    job = Job(plan, "albef", 1, tmp_path / "out")
    done(job)
    pretrain, retrieval = plan.stages
    assert job.is_done and job.result(retrieval)["metrics"]["txt_r1"] == 50
    spelt = read_plan(write(variants={"albef": ["model.itc.gamma=0.0"]}, seeds=[1]))
    moved = ["run.num_workers=0", "run.tensorboard=false"]  # which change nothing that is measured
    assert Job(replace(spelt, seeds=(1,)), "albef", 1, job.folder).is_done
    assert Job(read_plan(write(seeds=[1]), moved), "albef", 1, job.folder).is_done

    other = {**plan.asked["albef", "retrieval"], "run.k_test": 8}
    other_plan = replace(plan, asked={**plan.asked, ("albef", "retrieval"): other})
    changed = Job(other_plan, "albef", 1, job.folder)
    assert changed.result(pretrain)
    with pytest.raises(UserError, match=f"k_test = .*, but the plan has 8: delete {changed.home}"):
        changed.result(retrieval)
    (job.place(retrieval) / "result.json").write_text('{"run": ')
    with pytest.raises(UserError, match="result.json is missing or broken: delete "):
        job.result(retrieval)


def test_no_run_goes_on_that_began_with_something_else(write, tmp_path, monkeypatch):
    plan = read_plan(write(variants={"albef": []}, seeds=[1]))
    job = Job(plan, "albef", 1, tmp_path / "out")
    monkeypatch.setattr(run.launch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(run.run(job))
    longer = replace(plan, asked=read_plan(write(seeds=[1]), ["run.max_epoch=9"]).asked)
    with pytest.raises(UserError, match="run.max_epoch = 1, but the plan has 9: start the row"):
        next(run.run(replace(job, plan=longer)))
    with pytest.raises(KeyboardInterrupt):  # it does go on with the same
        next(run.run(job))


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_what_a_stage_is_run_with(write, tmp_path, monkeypatch):
    """The folder's name holds what YAML reads as a comment, and as a key."""
    seen = []

    def pretend(config, options, evaluate):
        launched = launch.load_config(config, options, evaluate).config
        seen.append(launched)
        (folder := launched.run.output_dir / pathlib.Path("mine")).mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("")
        runner = SimpleNamespace(output_dir=folder, device=torch.device("cpu"), max_epoch=3)
        return runner, {"test": {"txt_r1": 60.0}}

    monkeypatch.setattr(run.launch, "run", pretend)
    stage = {"config": EVALUATE, "metrics": ["txt_r1"]}
    vocabulary = ["model.tokenizer=PRETRAINED/vocab.txt"]
    evaluate = [
        {**stage, "name": "a", "options": vocabulary},
        {**stage, "name": "b", "pretrained": False},
    ]
    plan = read_plan(write(variants={"albef": []}, seeds=[7], evaluate=evaluate))
    job = Job(plan, "albef", 7, tmp_path / "runs #1: x")
    (_, first), (_, a), _ = run.run(job)
    pretrain, with_weights, without = seen
    assert pretrain.run.seed == 7 and pretrain.run.output_dir == str(job.home / "pretrain")
    assert pretrain.run.resume_ckpt_path == "auto" and "resume_ckpt_path" not in without.run
    folder = job.home / "pretrain" / "mine"
    assert with_weights.model.tokenizer == str(folder / "vocab.txt")
    assert with_weights.model.pretrained == str(folder / "checkpoint_2.pth")
    assert without.model.get("pretrained") is None
    assert first["losses"] == {} and a["metrics"] == {"txt_r1": 60.0}
    with pytest.raises(UserError, match="stage 'a' gave no 'txt_r1'"):
        run._metrics(plan.evaluate[0], {"test": {"r_mean": 1.0}})


def test_two_commands_do_not_work_on_one_job(write, tmp_path):
    plan = write(variants={"albef": []}, seeds=[0])
    job = Job(read_plan(plan), "albef", 0, tmp_path / "out")
    job.home.mkdir(parents=True)
    held = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, job.home / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"another command works on {job.home}"):
            next(run.run(job))
        with pytest.raises(UserError, match="another command works on"):
            command.main(plan, job.folder, again=True)
        other.communicate(b"\n")
    job.discard()
    assert not job.home.exists()


def test_the_error_of_the_first_run_is_told_where_none_succeeds(write, tmp_path, monkeypatch):
    plan = write(variants={"albef": []}, seeds=[0])
    monkeypatch.setattr(command, "work", lambda jobs, *_: [(jobs[0], UserError("no memory"))])
    with pytest.raises(UserError, match="1 of 1 runs failed, first albef, seed 0: no memory"):
        command.main(plan, tmp_path / "out")


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


def test_a_cost_is_that_of_this_pair(write, tmp_path, monkeypatch, caplog):
    variants = {"albef": [], "gamma": ["model.itc.gamma=1"]}
    job = Job(read_plan(write(variants=variants, seeds=[0])), "gamma", 0, tmp_path / "out")
    done(job)
    assert job.cost is None and job.has_to_time
    monkeypatch.setattr(run, "relative_cost", lambda *_: [1.0, 1.5, 2.0])
    assert [*run.run(job)] == [] and job.cost == [1.0, 1.5, 2.0] and job.is_done
    variants["albef"] = ["model.bert.layers=6"]
    other = Job(read_plan(write(variants=variants, seeds=[0])), "gamma", 0, job.folder)
    assert other.cost is None and other.has_to_time and not other.unfinished

    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run, "relative_cost", too_large)
    assert [*run.run(other)] == [] and "do not fit" in caplog.text
    assert other.cost is None and other.is_done  # it would not fit the next time either


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


def test_a_worker_that_dies_after_a_message_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_serve", tell_and_die)
    job = Job(read_plan(SMALL), "albef", 0, tmp_path)
    messages = []
    for _, message in workers.work([job, job], [Slot(1)], tmp_path):
        messages.append(message)
        time.sleep(0.3)  # it is dead before its next message is waited for
    assert [type(message) for message in messages] == [str, UserError, str, UserError]


def tell_and_die(pipe, *_):
    pipe.recv()
    pipe.send("a stage's result")
    os._exit(9)


# ---- the table


def test_the_arithmetic_of_a_row():
    found = table.measure({0: 3.0, 1: 5.0, 2: 10.0}, {0: 2.0, 1: 6.0, 3: 50.0})
    assert found.mean == 6 and found.deviation == pytest.approx(math.sqrt(13))
    assert found.differences == {0: 1.0, 1: -1.0} and (found.difference, found.wins) == (0.0, 1)
    alone = table.measure({0: 3.0}, {})
    assert alone.deviation is None and alone.difference is None and alone.interval is None
    two = table.measure({0: 3.0, 1: 4.0}, {0: 2.0, 1: 3.0})  # alike by chance, perhaps
    assert two.difference == 1 and two.interval is None and not two.tells


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
    assert lines[3] == "| soft | 43.5 ± 0.7 (+2.5, 2/2) | 2 | 1.50 (1.41 to 1.62) |"
    assert lines[-1] == "Still to be measured: late."
    clear = table.markdown(rows_of(albef=[40, 42, 41], soft=[50, 52, 51.3]), ["r1"], "albef")
    assert "| soft | 51.1 ± 1.0 (**+10.1 ± 0.4**, 3/3) | 3 |" in clear
    assert "as about 0.05 of these 1 would by chance, and in how many" in clear
    assert "interval" not in "".join(lines)  # two seeds have none
    low = table.markdown(rows_of(albef=[0.5], soft=[0.61]), ["r1"], "albef")
    assert "| soft | 0.6 (+0.1, 1/1) | 1 |" in low and "In percent: mean" in low
    unknown = table.measure({0: 1.1729}, {0: 1.2}, percent=False)
    assert table.cell(unknown) == "1.173 (-0.027, 0/1)"


def test_shares_are_told_in_percent(tmp_path):
    plan = read_plan("lavis_configs/ablation/scenes_tasks.yaml", seeds=1)
    done(Job(plan, "albef", 0, tmp_path), 0.731)
    albef = table.rows(plan, tmp_path, "albef")[0]
    found = {name: metric.mean for name, metric in albef.metrics.items()}
    assert found["entailment acc"] == found["nlvr acc"] == pytest.approx(73.1)
    assert found["vqa agg_metrics"] == found["tuned_retrieval txt_r1"] == 0.731  # percent already
    assert all(metric.percent for metric in albef.metrics.values())


def test_the_groups_of_grounding_can_be_asked_for(write):
    stage = {
        "name": "grounding",
        "config": "lavis_configs/projects/scenes/eval/grounding_tiny.yaml",
    }
    assert read_plan(write(evaluate=[{**stage, "metrics": ["acc_testA", "pointing_chance"]}]))
    with pytest.raises(UserError, match="unknown metric 'accu_testA'"):
        read_plan(write(evaluate=[{**stage, "metrics": ["accu_testA"]}]))


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
