"""softmask ablate: jobs that resume, which results count, and the processes."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from ablations import EVALUATE, SMALL, done, small_plan
from forks import FORK, be_another_process
from omegaconf import OmegaConf

from softmask_plugin import cli, launch
from softmask_plugin.ablate import command, cost, pool
from softmask_plugin.ablate import job as jobs
from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import read_plan
from softmask_plugin.config.check import find_config
from softmask_plugin.errors import UserError

SLOT = [{"OMP_NUM_THREADS": "1", "SLOT": "0"}]


def fork_jobs(monkeypatch):
    """Run jobs in forks: a process that is started afresh imports LAVIS for seconds."""
    work = pool._work
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda _: FORK)
    monkeypatch.setattr(pool, "_work", lambda *given: be_another_process() or work(*given))


def test_an_ablation_survives_a_failing_variant_and_repeats_nothing(
    write_plan, tmp_path, capfd, monkeypatch
):
    fork_jobs(monkeypatch)
    monkeypatch.setattr(jobs, "relative_cost", partial(cost.relative_cost, rounds=3))
    bad = ["datasets.scenes_pretrain.objects=7"]  # which the data set refuses once it is built
    variants = {"albef": [], "bad": bad, "gamma": ["model.itc.gamma=1"]}
    plan, folder = write_plan(variants=variants, seeds=[0]), tmp_path / "out"
    with pytest.raises(UserError, match="1 of 3 runs failed, first bad, seed 0: .*objects"):
        command.main(plan, folder, jobs=2)
    shown = capfd.readouterr().out
    assert "gamma, seed 0: retrieval, txt_r1" in shown and "Not measured yet: bad." in shown
    content = json.loads((folder / "mine.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert not rows["bad"]["metrics"] and rows["albef"]["cost"] is None
    low, median, high = rows["gamma"]["cost"]
    assert 0 < low <= median <= high
    assert [*rows["gamma"]["metrics"]["retrieval txt_r1"]["differences"]] == ["0"]
    assert rows["gamma"]["ran_on"][0]["torch"] == torch.__version__
    assert 0 < rows["gamma"]["losses"]["itm"]["0"] < math.inf and "| gamma | " in shown
    assert (folder / "mine.png").stat().st_size > 5000
    assert "softmask_plugin" not in shown  # what the runs print is in their logs
    assert "softmask_pretrain" in Job(read_plan(plan), "gamma", 0, folder).log.read_text()

    # All that is asked for is there: the table alone is written again
    monkeypatch.setattr(command, "work", None)
    page = (folder / "mine.md").read_text()
    (folder / "mine.md").unlink()
    assert command.main(plan, folder, only=["albef", "gamma"]).read_text() == page
    against = command.main(plan, folder, only=["albef"], baseline="gamma").read_text()
    assert "**gamma**" in against

    # What is there is of other options
    changed = ["model.soft_mask.strength=0.5"]
    with pytest.raises(UserError, match=r"strength = 1.0, but .* 0.5: .*--only gamma --again"):
        command.main(plan, folder, only=["gamma"], options=changed)
    with pytest.raises(TypeError):  # with --again it would be run
        command.main(plan, folder, only=["gamma"], options=changed, again=True)
    assert not [*(folder / "gamma").iterdir()] and (folder / "albef" / "seed_0").exists()


def test_variants_start_from_the_trunk_of_their_seed(write_plan, tmp_path, monkeypatch):
    """They stay at its weights where they learn nothing."""
    fork_jobs(monkeypatch)
    given = small_plan(variants={"albef": []}, seeds=[0, 1])
    given["base"]["options"] += ["run.init_lr=1e-30", "run.min_lr=1e-30"]
    trunk = ["run.init_lr=1e-3", "run.min_lr=1e-3"]
    plan, folder = write_plan(**{**given, "trunk": trunk}), tmp_path / "out"
    command.main(plan, folder, jobs=2)
    read = read_plan(plan)
    trained = {}
    for seed in read.seeds:
        of_trunk, fork = (Job(read, name, seed, folder) for name in ("trunk", "albef"))
        trained[seed] = weights(of_trunk.checkpoint(read.trunk))
        torch.testing.assert_close(weights(fork.checkpoint(read.base)), trained[seed])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained[0], trained[1])

    changed = write_plan(**{**given, "trunk": [*trunk, "run.beta2=0.9"]})
    with pytest.raises(UserError, match=r"trunk had run.beta2 = 0.98, .* has 0.9: delete .*trunk"):
        command.main(changed, folder)


def weights(file):
    found = torch.load(file, weights_only=True)["model"]
    return {key: value for key, value in found.items() if "_m." not in key}


def test_no_variant_runs_if_its_trunk_fails(write_plan, tmp_path, monkeypatch):
    fork_jobs(monkeypatch)
    monkeypatch.setattr(pool, "_work", die)
    plan = read_plan(write_plan(variants={"albef": []}, trunk=[]))
    jobs = [Job(plan, name, 0, tmp_path) for name in ("albef", "trunk")]
    errors = {job.variant: str(error) for job, error in pool.work(jobs, SLOT * 2)}
    assert "died with exit code 9" in errors["trunk"] and "trunk failed" in errors["albef"]


@pytest.mark.parametrize("folder", ["/proc/self/out", "there"])
def test_a_read_only_folder_is_one_line(write_plan, tmp_path, capfd, monkeypatch, folder):
    """Before any process is started, each of which would print a traceback."""
    monkeypatch.chdir(tmp_path)
    if folder == "there":  # of a file system that was made read-only since
        read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), "output.log")
        monkeypatch.setattr(pathlib.Path, "touch", Mock(side_effect=read_only))
    given = ["--plan", str(write_plan(variants={"albef": []}, seeds=[0])), "--output-dir", folder]
    assert cli.main(["ablate", *given]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("softmask: error: ") and line.endswith(
        ": check the path, or name another one"
    )


def test_a_result_counts_only_for_the_configuration_it_was_made_with(write_plan, tmp_path):
    """Not for the name of its YAML file: that may have changed since."""
    plan = read_plan(write_plan(variants={"albef": []}, seeds=[1]))
    job = Job(plan, "albef", 1, tmp_path / "out")
    done(job)
    pretrain, retrieval = plan.stages
    assert job.is_done and job.result(retrieval)["metrics"]["txt_r1"] == 50
    spelt = read_plan(write_plan(variants={"albef": ["model.itc.gamma=0.0"]}, seeds=[1]))
    moved = ["run.num_workers=0", "run.tensorboard=false"]  # which change nothing that is measured
    assert Job(replace(spelt, seeds=(1,)), "albef", 1, job.folder).is_done
    assert Job(read_plan(write_plan(seeds=[1]), moved), "albef", 1, job.folder).is_done

    earlier = {**job.asked(retrieval), "model.pretrained": "replaced.pth"}
    (job.place(retrieval) / "asked.json").write_text(json.dumps(earlier))
    assert job.result(retrieval)

    other = {**plan.asked["albef", "retrieval"], "run.k_test": 8}
    other_plan = replace(plan, asked={**plan.asked, ("albef", "retrieval"): other})
    changed = Job(other_plan, "albef", 1, job.folder)
    assert changed.result(pretrain)
    with pytest.raises(UserError, match=f"k_test = .*, but the plan has 8: delete {changed.home}"):
        changed.result(retrieval)
    (job.place(retrieval) / "result.json").write_text('{"run": ')
    with pytest.raises(UserError, match="result.json is missing or broken: delete "):
        job.result(retrieval)


def test_a_run_resumes_only_with_the_configuration_it_was_begun_with(
    write_plan, tmp_path, monkeypatch
):
    plan = read_plan(write_plan(variants={"albef": []}, seeds=[1]))
    job = Job(plan, "albef", 1, tmp_path / "out")
    monkeypatch.setattr(launch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(job.run())
    longer = replace(plan, asked=read_plan(write_plan(seeds=[1]), ["run.max_epoch=9"]).asked)
    with pytest.raises(UserError, match="run.max_epoch = 1, but the plan has 9: start it anew"):
        next(replace(job, plan=longer).run())
    with pytest.raises(KeyboardInterrupt):  # it does go on with the same
        next(job.run())


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_the_options_of_a_stage(write_plan, tmp_path, monkeypatch):
    """The folder's name holds what YAML reads as a comment, and as a key."""
    seen = []

    def pretend(config, options, evaluate):
        launched = launch.load_config(config, options, evaluate).config
        seen.append(launched)
        (folder := launched.run.output_dir / pathlib.Path("mine")).mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("")
        (folder / "checkpoint_2.pth").touch()
        runner = SimpleNamespace(output_dir=folder, device=torch.device("cpu"), max_epoch=3)
        return runner, {"test": {"txt_r1": 60.0}}

    monkeypatch.setattr(launch, "run", pretend)
    stage = {"config": EVALUATE, "metrics": ["txt_r1"]}
    evaluate = [
        {**stage, "name": "a"},
        {**stage, "name": "b", "pretrained": False, "options": ["model.load_pretrained=false"]},
        {**stage, "name": "c", "metrics": ["img_r1"]},
    ]
    plan = read_plan(write_plan(variants={"albef": []}, seeds=[7], evaluate=evaluate))
    job = Job(plan, "albef", 7, tmp_path / "runs #1: x")
    finished = []
    with pytest.raises(UserError, match="stage 'c' gave no 'img_r1': did you mean 'txt_r1'"):
        finished += job.run()
    (_, first), (_, a), _ = finished
    pretrain, with_weights, without, _ = seen
    assert pretrain.run.seed == 7 and pretrain.run.output_dir == str(job.home / "pretrain")
    assert pretrain.run.resume_ckpt_path == "auto" and "resume_ckpt_path" not in without.run
    folder = job.home / "pretrain" / "mine"
    assert with_weights.model.pretrained == str(folder / "checkpoint_2.pth")
    assert without.model.get("pretrained") is None
    assert first["losses"] == {} and a["metrics"] == {"txt_r1": 60.0}


def test_two_commands_do_not_work_on_one_job(write_plan, tmp_path):
    plan = write_plan(variants={"albef": []}, seeds=[0])
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
            next(job.run())
        with pytest.raises(UserError, match="another command works on"):
            command.main(plan, job.folder, again=True)
        other.communicate(b"\n")
    job.discard()
    assert not job.home.exists()


def test_the_first_error_is_reported_if_no_run_succeeds(write_plan, tmp_path, monkeypatch):
    plan = write_plan(variants={"albef": []}, seeds=[0])
    monkeypatch.setattr(command, "work", lambda jobs, *_: [(jobs[0], UserError("no memory"))])
    with pytest.raises(UserError, match="1 of 1 runs failed, first albef, seed 0: no memory"):
        command.main(plan, tmp_path / "out")


def test_results_of_another_plan_are_not_discarded(write_plan, tmp_path):
    plan = write_plan(variants={"albef": []})
    other = tmp_path / "out" / "albef" / "seed_1" / "vqa"
    other.mkdir(parents=True)
    with pytest.raises(UserError, match="--again: .*seed_1/vqa belongs to another plan"):
        command.main(plan, tmp_path / "out", again=True)
    assert other.exists()


def test_ctrl_c_says_how_to_resume(write_plan, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "work", interrupt)
    with pytest.raises(KeyboardInterrupt, match="the same command resumes it"):
        command.main(write_plan(variants={"albef": []}), tmp_path / "out")


@pytest.mark.parametrize(("in_the_file", "in_the_plan"), [(None, 250), (250, 0)])
def test_a_step_is_timed_with_the_mask_on(
    write_plan, tmp_path, monkeypatch, in_the_file, in_the_plan
):
    late = f"model.soft_mask.start_iter={in_the_plan}"
    variant = ["model.soft_mask.enabled=true", late, "model.alpha=0.4"]
    base = small_plan()["base"]
    if in_the_file:
        config = OmegaConf.load(find_config(base["config"]))
        config.model.soft_mask = {"start_iter": in_the_file}
        OmegaConf.save(config, tmp_path / "late.yaml")
        base["config"] = str(tmp_path / "late.yaml")
    plan = read_plan(write_plan(base=base, variants={"albef": [], "late": variant}))
    launched, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda *given: launched.append(run(*given)) or launched[0])
    assert next(cost.take_steps(plan, "late", str(tmp_path))) > 0
    ((runner, _),) = launched
    assert runner._model.options.soft_mask.start_iter == 0
    first = {"epoch": 0, "iters": 0, "num_iters_per_epoch": 9}
    assert runner._model.progress(first)[1] == 0.4


def test_a_cost_counts_only_for_the_pair_it_was_measured_with(
    write_plan, tmp_path, monkeypatch, caplog
):
    variants = {"albef": [], "gamma": ["model.itc.gamma=1"]}
    job = Job(read_plan(write_plan(variants=variants, seeds=[0])), "gamma", 0, tmp_path / "out")
    done(job)
    assert not job.cost and job.has_to_time
    monkeypatch.setattr(jobs, "relative_cost", lambda *_: [1.0, 1.5, 2.0])
    assert [*job.run()] == [] and job.cost == {"step_time": [1.0, 1.5, 2.0]} and job.is_done
    variants["albef"] = ["model.bert.layers=6"]
    other = Job(read_plan(write_plan(variants=variants, seeds=[0])), "gamma", 0, job.folder)
    assert not other.cost and other.has_to_time and not other.unfinished

    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.undo()
    monkeypatch.setattr(cost, "take_steps", too_large)
    assert [*other.run()] == [] and "do not fit" in caplog.text
    assert (
        other.cost == {"step_time": None} and other.is_done
    )  # it would not fit the next time either


def test_a_killed_ablation_resumes(write_plan, tmp_path, monkeypatch):
    """The killed one's workers end with it, so that their runs can be taken up."""
    plan, folder = write_plan(variants={"albef": []}), tmp_path / "out"
    asked = ["ablate", "--plan", str(plan), "--output-dir", str(folder), "--jobs", "2"]
    reader, writer = os.pipe()
    first = FORK.Process(target=ablate_in_a_session, args=(writer, asked))
    first.start()
    os.close(writer)
    try:
        with open(reader) as shown:
            assert "pretrain" in shown.readline()
        first.kill()
        first.join()
        until_no_process_is_left(first.pid)
    finally:
        if first.is_alive():
            os.killpg(first.pid, signal.SIGKILL)
    results = {file: file.stat().st_mtime_ns for file in folder.rglob("result.json")}
    assert 1 <= len(results) < 4
    fork_jobs(monkeypatch)
    assert cli.main(asked) == 0
    assert len([*folder.rglob("result.json")]) == 4
    assert all(file.stat().st_mtime_ns == then for file, then in results.items())
    assert "| **albef** |" in (folder / "mine.md").read_text()


def ablate_in_a_session(output, asked):
    """The command, with the processes that it starts, as a group that can be listed and killed."""
    os.setsid()
    os.dup2(output, 1)
    be_another_process()
    sys.exit(cli.main(asked))


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
    assert pool.slots(cuda=True, jobs=1) == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": device} for device in "01"
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in pool.slots(cuda=True, jobs=1)] == ["3", "5"]
    assert pool.slots(cuda=False, jobs=3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert pool.slots(cuda=False, jobs=99)[0] == {"OMP_NUM_THREADS": "1"}


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    fork_jobs(monkeypatch)
    monkeypatch.setattr(pool, "_work", die)
    job = Job(read_plan(SMALL), "albef", 0, tmp_path)
    ((of, error),) = pool.work([job], SLOT)
    assert of is job and "died with exit code 9" in str(error) and str(job.log) in str(error)
    assert "SLOT" not in os.environ  # it is set for the process alone


def die(*_):
    os._exit(9)


def test_a_process_that_dies_after_a_message_is_reported(tmp_path, monkeypatch):
    fork_jobs(monkeypatch)
    monkeypatch.setattr(pool, "_work", tell_and_die)
    job = Job(read_plan(SMALL), "albef", 0, tmp_path)
    messages = []
    for _, message in pool.work([job, job], SLOT):
        messages.append(message)
        time.sleep(0.3)  # it is dead before its next message is waited for
    assert [type(message) for message in messages] == [tuple, UserError, tuple, UserError]
    assert messages[0] == ("a stage", "0")


def tell_and_die(job, pipe):
    pipe.send(("a stage", os.environ["SLOT"]))
    os._exit(9)
