"""``import softmask_plugin`` if LAVIS is missing, cannot work, or works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from softmask_plugin.errors import UserError
from softmask_plugin.host import compat

# Pretends another environment: some packages have another version, or are missing.
PRETEND = """
import importlib.metadata as metadata, os, sys
real, pretended = metadata.version, {versions}
def version(name):
    have = pretended.get(name, "real")
    if have is None:
        raise metadata.PackageNotFoundError(name)
    return real(name) if have == "real" else have
metadata.version = version
if "salesforce-lavis" in pretended:
    sys.modules["lavis"] = None
"""
TORCH_ONLY = """
import softmask_plugin, softmask_plugin.losses, softmask_plugin.soft_mask, softmask_plugin.nn.pairs
assert not hasattr(softmask_plugin, "FocalITCLoss")
assert "lavis.common" not in sys.modules
print(os.environ["GOMP_SPINCOUNT"])
"""


def python(code, versions=(), **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    return subprocess.run(
        [sys.executable, "-c", PRETEND.format(versions=dict(versions)) + code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**inherited, **environment},
    )


def test_without_lavis_the_torch_only_parts_import_without_a_warning():
    done = python(TORCH_ONLY, {"salesforce-lavis": None})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "3000\n"  # idle threads spin briefly, unless the user sets it


def test_a_stack_that_cannot_work_gets_one_warning():
    stack = {"numpy": "2.0.0", "opencv-python-headless": "4.5.5.64"}
    done = python(TORCH_ONLY, stack, GOMP_SPINCOUNT="7")
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "UserWarning" in line)
    assert "pip install 'numpy<2'" in warning
    assert done.stdout == "7\n"


@pytest.mark.parametrize("versions", [{"salesforce-lavis": None}, {"transformers": "4.56.2"}])
def test_the_doctor_runs_on_a_broken_stack(versions):
    doctor = "from softmask_plugin.cli import main; sys.exit(main(['doctor']))"
    done = python(doctor, versions)
    assert done.returncode == 1, done.stderr
    assert "What to do\n! " in done.stdout
    assert any(line.startswith("! ") and "pip install" in line for line in done.stdout.splitlines())


def test_the_doctor_says_why_lavis_cannot_be_imported():
    """Its version is right, but something that it needs is missing."""
    doctor = "from softmask_plugin.cli import main; sys.exit(main(['doctor']))"
    done = python(f"sys.modules['lavis'] = None; {doctor}", SOFTMASK_COMMAND="starts")
    assert (done.returncode, done.stderr) == (1, "")
    line = done.stdout.splitlines()[-1]
    assert line.startswith("! import lavis fails (ModuleNotFoundError: ")
    assert "install what it misses" in line
    assert "\n  torch " in done.stdout


def test_other_commands_say_it_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "lavis.models", None)
    with pytest.raises(UserError, match="^import lavis fails "):  # one line in the command line
        compat.patch()


def test_the_import_leaves_for_later_what_few_commands_need():
    done = python(
        "import softmask_plugin, softmask_plugin.cli, softmask_plugin.launch, gc\n"
        "assert gc.isenabled()\n"
        "print(sorted({'matplotlib', 'scipy.stats', 'softmask_plugin.tasks'} & {*sys.modules}))"
    )
    assert done.stdout.strip() == "['softmask_plugin.tasks']", done.stderr
