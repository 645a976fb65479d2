"""Whose a run's folder is, and what happens where it cannot be written."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from forks import FORK, be_another_process, forked
from toys import build

from softmask_plugin import launch
from softmask_plugin.cli import main
from softmask_plugin.errors import UserError
from softmask_plugin.runners import run_folder
from softmask_plugin.vocabulary import build_tokenizer


def hold(pipe, output_dir, how):
    """Claim a folder and keep it, beside a worker as data loaders have them."""
    be_another_process()
    folder = run_folder.claim(output_dir, "job", resume=how == "auto")
    worker = FORK.Process(target=time.sleep, args=(30,))  # outlives a killed parent
    worker.start()
    pipe.send((folder.name, worker.pid))
    pipe.recv()


@pytest.fixture
def another():
    """Another process that claims a folder and keeps it: ``another(output_dir, how)``."""
    processes, workers = [], []

    def start(output_dir, how="new"):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(theirs, output_dir, how))
        process.start()
        processes.append(process)
        theirs.close()  # so that a process that dies ends the wait for it
        name, worker = ours.recv()
        workers.append(worker)
        return process, name

    yield start
    for process in processes:
        process.kill()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def test_runs_of_one_name_have_folders_of_their_own(tmp_path, another):
    """As of LAVIS's train.py, whose job id changes every ten minutes only."""
    assert another(tmp_path)[1] == "job"
    assert build(tmp_path).output_dir.name == "job-2"
    assert another(tmp_path)[1] == "job-3"


def test_a_living_run_is_not_taken_over_a_killed_one_is(tmp_path, another):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "checkpoint_0.pth").touch()
    process, name = another(tmp_path, "auto")
    assert name == "job"
    assert run_folder.claim(tmp_path, "mine", resume=True).name == "mine"
    run_folder.release(tmp_path / "mine")
    process.kill()
    process.join()
    assert run_folder.claim(tmp_path, "mine", resume=True).name == "job"  # its worker still lives
    run_folder.release(tmp_path / "job")


def test_a_folder_in_which_nothing_was_written_goes(tmp_path):
    for name in ("nothing", "something"):
        (run_folder.claim(tmp_path, name, resume=False) / "result").mkdir()
    (tmp_path / "something" / "result" / "a.json").touch()
    for name in ("nothing", "something"):
        run_folder.release(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_the_newest_run_goes_on(tmp_path):
    for age, name in enumerate(("new", "newest", "old")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "checkpoint_3.pth"
        path.touch()
        os.utime(path, (0, (2, 3, 1)[age]))
    (tmp_path / "evaluated").mkdir()
    assert run_folder.claim(tmp_path, "mine", resume=True).name == "newest"
    run_folder.release(tmp_path / "newest")


def test_a_run_that_ended_has_let_its_folder_go(tmp_path, another):
    runner = build(tmp_path)
    runner.train()
    assert another(tmp_path, "auto")[1] == runner.output_dir.name


SCENES = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["environment.json", "config.yaml", "vocab.txt"])
def test_a_disk_full_from_the_start_is_one_line(tmp_path, capsys, monkeypatch, name):
    runner = build(tmp_path)
    runner.model.tokenizer = build_tokenizer("scenes")
    file = runner.output_dir / name
    file.with_name(f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    monkeypatch.setattr(launch, "run", lambda **_: runner.train())
    assert main(["train", "--cfg-path", SCENES]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"softmask: error: {file}: No space left on device: make room"
    assert not file.exists() and not list(runner.output_dir.glob(".*.tmp"))


def fill_the_disk(output_dir):
    """Train; after the first epoch there is no room for more than half a checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    runner = build(output_dir, max_epoch=3, keep_checkpoints=None)

    def fill(model, _):
        if len(model.seen) == 12:
            half = (runner.output_dir / "checkpoint_0.pth").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))

    runner.model.register_forward_pre_hook(fill)
    try:
        runner.train()
    except UserError as error:
        print(error)


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tmp_path):
    done = forked(fill_the_disk, tmp_path)
    folder = tmp_path / "job"
    (message,) = done.stdout.splitlines()
    assert f"cannot save {folder / 'checkpoint_1.pth'} (" in message
    assert f"the last whole checkpoint: {folder / 'checkpoint_0.pth'}" in message
    assert [path.name for path in folder.glob("*pth*")] == ["checkpoint_0.pth"]
    assert not list(folder.glob(".*.tmp"))
    again = build(tmp_path, max_epoch=3, keep_checkpoints=None, resume_ckpt_path="auto")
    again.train()
    assert again.output_dir == folder and again.step == 30


def test_a_run_stopped_while_it_is_saved_is_known_by_its_leftover(tmp_path):
    runner = build(tmp_path)
    leftover = runner.output_dir / ".checkpoint_0.pth.tmp"
    leftover.write_bytes(b"half")
    runner.train()
    assert not leftover.exists()
