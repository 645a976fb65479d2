"""Loads the shared fixtures, and saves time: an import, searches for garbage, a last long file."""

from __future__ import annotations

import gc

gc.disable()  # LAVIS's import makes a million objects and no garbage; see below

# Started last, they would keep one core waiting for the other.
LONGEST = [
    "runners/test_workers.py",
    "project/test_benchmarks.py",
    "runners/test_resume.py",
    "project/test_examples.py",
    "config/test_shipped_files.py",
    "ablate/test_runs.py",
    "datasets/shards/test_runs.py",
]


def pytest_configure(config):
    # xdist's first process runs no tests: it need not import LAVIS, which takes seconds
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items):
    rank = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0].removeprefix("tests/"), 99))


def pytest_collection_finish():
    gc.freeze()  # what there is now is never garbage
    gc.enable()
