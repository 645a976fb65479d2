"""Claim a run's folder for one process, and find it again to resume."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import IO

from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import furthest_first
from softmask_plugin.runners.peers import from_main_process

AUTO = "auto"  # run.resume_ckpt_path: the newest run below run.output_dir that is not running

# POSIX locks: the kernel frees them when a process is killed, and its data loader's workers, which
# live some seconds longer, do not inherit them (as they would with flock).
_held: dict[Path, IO[bytes]] = {}


def claim(output_dir: Path, job_id: str, resume: bool) -> Path:
    """Claim a folder that no other living process has, the same one on every rank; UserError if
    none can be made.

    Args:
        output_dir: Parent of the runs' folders.
        job_id: Name of a new folder; gets a number if it is taken.
        resume: Take the newest folder with a checkpoint instead, if there is one.
    """
    return from_main_process(lambda: _claim(output_dir, job_id, resume))


def release(folder: Path) -> None:
    """Give up a claimed folder; one in which nothing was written goes with it."""
    file = _held.pop(folder, None)
    if file is None:
        return
    file.close()
    if not any(each.is_file() and each.name != ".lock" for each in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)


def _claim(output_dir: Path, job_id: str, resume: bool) -> Path:
    if output_dir / job_id in _held:  # claimed earlier in this process
        return output_dir / job_id
    if resume:
        for folder in _with_checkpoints(output_dir):
            if folder in _held or lock(folder):
                return folder
            logging.info("passed over %s: a run is in it, or it cannot be written", folder)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = output_dir / (job_id if number == 1 else f"{job_id}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            lock(folder)
            return folder
    except OSError as error:
        raise UserError(
            f"run.output_dir: {output_dir} cannot be written ({error.strerror}): name another "
            "folder"
        ) from error
    raise AssertionError("unreachable")


def _with_checkpoints(output_dir: Path) -> list[Path]:
    """Folders with a checkpoint to resume from, the newest checkpoint first."""
    furthest = [files[0] for each in output_dir.glob("*/") if (files := furthest_first(each))]
    furthest.sort(key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)
    return [file.parent for file in furthest]


def lock(folder: Path) -> bool:
    """Lock a folder that this process does not have yet; False if another process has it, or
    nothing can be written there."""
    try:
        file = (folder / ".lock").open("wb")
    except OSError:
        return False
    try:
        import fcntl  # which Windows lacks

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return False
    except (OSError, ImportError):  # some network file systems have no locks either
        logging.warning("%s cannot be locked: do not start a second run in it", folder)
    _held[folder] = file
    return True
