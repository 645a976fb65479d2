"""Forks of the test process, for code that needs a process of its own but no fresh import of LAVIS.

A fresh process imports for six seconds; a fork has it all. It shows nothing about imports, though.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from subprocess import CompletedProcess
from tempfile import TemporaryFile

import torch

from softmask_plugin.runners import run_folder

FORK = multiprocessing.get_context("fork")


def forked(function, *arguments, timeout=300) -> CompletedProcess:
    """Call a function in a fork; its exit status is what ``sys.exit`` would make of the result."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = FORK.Process(target=_call, args=(out, err, function, *arguments))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{function} took more than {timeout} s")
        out.seek(0)
        err.seek(0)
        return CompletedProcess(function, process.exitcode, out.read(), err.read())


def _call(out, err, function, *arguments):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    be_another_process()
    sys.exit(function(*arguments))


def be_another_process() -> None:
    """Leave to the parent what a fork inherits but a fresh process would not have."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)  # more would wait for threads that only the parent has
    logging.root.handlers.clear()  # pytest's
    run_folder._held.clear()
