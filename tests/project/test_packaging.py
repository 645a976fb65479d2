"""The wheel: what is in it, and that it works when installed away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), cwd=ROOT)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_only_the_package_and_its_data(wheel):
    held = set(ZipFile(wheel).namelist())
    source = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "softmask_plugin").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    configs = {
        f"softmask_plugin/{file.relative_to(ROOT).as_posix()}"
        for file in (ROOT / "lavis_configs").rglob("*.yaml")
    }
    assert configs
    assert "softmask_plugin/assets/scenes_tiny.safetensors" in held
    own = source | configs | {"softmask_command.py"}
    assert {name for name in held if ".dist-info/" not in name} == own


def test_the_source_archive_holds_every_tracked_file(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing says what the project is made of")
    tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), cwd=ROOT)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    shown = {name for name in tracked if name[0] != "." and (ROOT / name).is_file()}
    assert shown <= held, shown - held


def test_the_installed_wheel_trains_on_a_shipped_config(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel))
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    find = "from importlib.util import find_spec; print(find_spec('softmask_plugin').origin)"
    found = run(sys.executable, "-c", find, cwd=work, env=environment).stdout
    assert found.startswith(str(site))  # and not the checkout
    run(
        *(str(site / "bin" / "softmask"), "train", "--cfg-path", "scenes/train/pretrain_tiny"),
        "--options",
        *("datasets.scenes_pretrain.num.train=8", "run.batch_size_train=4", "run.max_epoch=1"),
        *("run.num_workers=0", "run.output_dir=runs", "model.queue_size=8"),
        cwd=work,
        env=environment,
    )
    (checkpoint,) = (work / "runs").glob("*/checkpoint_*.pth")
    assert checkpoint.stat().st_size > 1e6


def test_pinned_versions_meet_the_declared_dependencies():
    pins = {}
    for line in (ROOT / "requirements" / "host.txt").read_text().splitlines():
        if re.match(r"[A-Za-z]", line):
            pin = Requirement(line)
            pins[pin.name] = next(iter(pin.specifier)).version
    declared = [Requirement(line) for line in distribution("softmask-plugin").requires or []]
    for dependency in (dependency for dependency in declared if dependency.name in pins):
        assert dependency.specifier.contains(pins[dependency.name]), dependency
    assert {"torch", "torchvision", "salesforce-lavis", "transformers", "numpy"} <= set(pins)
