"""The console script as a shell sees it: its speed, Ctrl-C, closed pipes, full disks, locales."""

from __future__ import annotations

import ast
import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import FORK, be_another_process

import softmask_command
from softmask_plugin import cli, launch
from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.errors import StartAgain
from softmask_plugin.files.checkpoint import furthest_first

SCRIPT = "import sys, softmask_command; sys.exit(softmask_command.main())"
SCENES = "scenes/train/pretrain_tiny"
LONG_RUN = [
    *("train", "--cfg-path", SCENES, "--options", "run.output_dir=my runs", "run.num_workers=2"),
    *("datasets.scenes_pretrain.num.train=64", "run.batch_size_train=8", "run.save_every_steps=2"),
    *("model.queue_size=8", "run.max_epoch=50", "run.log_freq=1"),
]


def softmask(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        **{"capture_output": True, "text": True, "timeout": 120, **options},
    )


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- speed


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["configs"], ["configs", SCENES]])
def test_help_and_lists_take_less_than_half_a_second(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = softmask(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout and not done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_command_has_everything_registered_and_passes_nothing_on(monkeypatch):
    code = (
        "import os, sys, softmask_plugin.cli as cli\n"
        "assert not {'torch', 'lavis'} & {*sys.modules}\n"
        "assert cli.main(['doctor', '--json']) == 0\n"
        "import softmask_plugin\n"
        "assert softmask_plugin.load_trained and 'SOFTMASK_COMMAND' not in os.environ\n"
    )
    environment = {**os.environ, "SOFTMASK_COMMAND": "starts"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"softmask_pretrain (base" in done.stdout


def test_the_script_calls_the_command(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda: 3)
    monkeypatch.setenv("SOFTMASK_COMMAND", "")  # so that it is gone afterwards
    assert softmask_command.main() == 3


# ---- Ctrl-C


def test_ctrl_c_while_the_command_is_imported_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("SOFTMASK_COMMAND", "")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=interrupt)])
    monkeypatch.delitem(sys.modules, "softmask_plugin.cli")
    assert softmask_command.main() == 130
    assert capsys.readouterr().err == "softmask: interrupted: the same command starts anew\n"


def command_in_a_group(file, arguments):
    os.setsid()
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    be_another_process()
    sys.exit(cli.main(arguments))


def started(*arguments):
    """A fork that runs a command in a process group of its own, as a terminal would."""
    with open("output", "w") as file:
        process = FORK.Process(target=command_in_a_group, args=(file, arguments))
        process.start()
    return process


def output() -> str:
    return Path("output").read_text()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, output()
        time.sleep(0.02)


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupted_run_names_the_command_that_goes_on(times):
    process = started(*LONG_RUN)
    wait_until(lambda: "step 3/400" in output())
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    process.join(60)
    assert process.exitcode == 130
    _, *steps, line = output().partition("step 1/400")[2].splitlines()
    assert all(" [INFO] " in step for step in steps)
    again = (
        "softmask train --cfg-path scenes/train/pretrain_tiny --options 'run.output_dir=my runs' "
        f"{' '.join(LONG_RUN[5:])} run.resume_ckpt_path=auto"
    )
    saved = max(Path("my runs").absolute().glob("*/checkpoint_0_*.pth"), key=os.path.getmtime)
    assert line == f"softmask: interrupted: {again} goes on from {saved}"


def two_processes():
    """Start a long run under torchrun, in a session of its own, and let it take three steps."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]
    with open("output", "w") as file:
        process = subprocess.Popen(
            [*launcher, "softmask_plugin.train", *LONG_RUN[1:], "run.warmup_steps=900"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    wait_until(lambda: "step 3/200" in output())
    return process


def test_two_processes_say_it_once():
    process = two_processes()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    (line,) = (line for line in output().splitlines() if "interrupted" in line)
    start = "softmask: interrupted: torchrun ... -m softmask_plugin.train --cfg-path scenes/train/"
    assert line.startswith(start) and re.search(r"goes on from /.*/checkpoint_0_\d.pth$", line)
    assert output().count("the warm-up (900 steps) is not shorter") == 1
    files = re.findall('File "(.*?)"', output())  # of torchrun's own traceback alone
    assert not [file for file in files if "/softmask_plugin/" in file or "/utils/data/" in file]


def test_sigterm_to_torchrun_ends_both_processes_after_a_step():
    process = two_processes()
    process.terminate()
    assert process.wait(60) != 0  # torchrun has a code of its own
    (line,) = (line for line in output().splitlines() if "ended after step" in line)
    step = int(re.search(r"ended after step (\d+) by SIGTERM", line)[1])
    (folder,) = Path("my runs").iterdir()
    progress = torch.load(furthest_first(folder)[0], weights_only=True)["progress"]
    assert progress["epoch"] * 4 + progress["taken"] / 16 == step


def test_an_interrupted_ablation_leaves_no_process_and_no_traceback():
    """Its processes, which import for seconds, would each print one."""
    process = started("ablate", "--plan", "small", "--output-dir", "out", "--jobs", "2")
    wait_until(lambda: len(members(process.pid)) > 2)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert output() == "softmask: interrupted: the same command resumes it\n"
    wait_until(lambda: members(process.pid) == [])


def members(group: int) -> list[str]:
    found = subprocess.run(["ps", "-eo", "pgid="], capture_output=True, text=True, check=True)
    return [line for line in found.stdout.split() if int(line) == group]


@pytest.mark.parametrize(
    ("stop", "evaluate", "message"),
    [
        (KeyboardInterrupt(), False, "the same command starts anew"),
        (launch.Interrupted(Path("nowhere")), False, "nothing is saved yet, so the same command"),
        (launch.Interrupted(Path("nowhere")), True, "the same command starts anew"),
    ],
    ids=["before the run", "before a checkpoint", "evaluation"],
)
def test_what_ctrl_c_means_for_a_run(monkeypatch, capsys, stop, evaluate, message):
    def run(**_):
        raise stop

    monkeypatch.setattr(launch, "run", run)
    name = "evaluate" if evaluate else "train"
    assert cli.main([name, "--cfg-path", SCENES]) == 130
    assert capsys.readouterr().err.startswith(f"softmask: interrupted: {message}")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setenv("RANK", "1")
    assert cli.main([name, "--cfg-path", SCENES]) == 130
    assert capsys.readouterr().err == ""


def test_the_code_of_a_run_that_a_signal_ended(monkeypatch, capsys):
    def run(**_):
        raise StartAgain

    monkeypatch.setattr(launch, "run", run)
    assert cli.main(["train", "--cfg-path", SCENES]) == 75
    assert capsys.readouterr().err == ""  # the run's log has its line


# ---- output that nobody reads, disks without room, text


@pytest.mark.parametrize("arguments", [["configs"], ["--help"], ["configs", SCENES]])
def test_a_closed_pipe_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = softmask(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) in [(141, ""), (0, "")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = softmask("configs", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "softmask: error: No space left on device: make room\n"


def test_any_text_is_printed_in_an_ascii_locale(monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    image = str(PACKAGE.parent / "examples" / "scene.png")
    given = ["--image", image, "--caption", "a red caf\u00e9 \u2603", "-o", "words.png"]
    assert cli.main(["explain", *given]) == 0
    text = printed.buffer.getvalue().decode("ascii")
    assert r"caf\xe9" in text and r"\u2603" in text


def test_text_files_have_the_encoding_that_the_code_names():
    """Not that of the locale."""
    others = ("os.", "Image.", "self.", "dataset.", "read_text")  # not Python's, or no text
    for file in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text("utf-8")))
        for node in (node for node in nodes if isinstance(node, ast.Call)):
            name, call = ast.unparse(node.func), ast.unparse(node)
            is_file = name.rpartition(".")[2] in ("open", "read_text", "write_text")
            if is_file and not name.startswith(others):
                assert re.search("utf-8|encoding|'[rwa]b'", call), f"{file}: {call}"
