"""``softmask check``: try a run's configuration, data and first steps before the run itself."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import is_tensor

from softmask_plugin import launch
from softmask_plugin.errors import UserError
from softmask_plugin.runners.runner import SoftmaskRunner

STEPS, SECONDS = 6, 20.0  # optimizer steps, the first of which is not timed; fewer if they are slow


def check(cfg_path: str, options: Sequence[str] = ()) -> Iterator[str]:
    """Load the data and a batch of each split, take a few steps, and estimate the run's time.

    Weights are loaded as in the run, but a run to resume is not. Nothing is written outside a
    temporary folder.

    Yields:
        A line about each part that is in order.

    Raises:
        UserError: Something is wrong.
    """
    cfg = launch.load_config(cfg_path, options)
    _require_writable(Path(cfg.run_cfg.output_dir))
    with tempfile.TemporaryDirectory() as folder:
        cfg.run_cfg.output_dir, cfg.run_cfg.resume_ckpt_path = folder, None
        with launch.prepared(cfg) as runner:
            if not isinstance(runner, SoftmaskRunner):
                raise UserError("only runs of run.runner=softmask_runner can be checked")
            yield from _check(runner)


def timed_steps(runner: SoftmaskRunner) -> Iterator[float]:
    """Take training steps without end; yield the duration of each, data loading included, s.

    They count as the run's last step, in which every loss is on, and ``run.keep_features`` is not
    followed, which would take longer than they do.
    """
    runner.model.train()
    loader, accumulated = runner.train_loader, runner.accum_grad_iters
    epoch, step = divmod(max(runner.total_steps - 1, 0), runner.steps_per_epoch)
    group = range(step * accumulated, (step + 1) * accumulated)
    batches = itertools.chain.from_iterable(loader.batches(i, 0) for i in itertools.count())
    while True:
        began = now()
        runner.train_step(batches, epoch, group)
        yield now() - began


def now() -> float:
    """The clock in seconds, after all pending GPU work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _require_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"run.output_dir: {there} cannot be written: name another folder")


def _check(runner: SoftmaskRunner) -> Iterator[str]:
    model = runner.resolved_config["model"]
    weights = sum(each.numel() for each in runner.unwrap_dist_model(runner.model).parameters())
    yield f"model   {model['arch']}, type {model['model_type']}: {weights:,} weights"
    train = [] if runner.evaluate_only else ["train"]
    if train:
        runner.require_splits()
    for split in (*runner.valid_splits, *runner.test_splits, *train):
        loader = runner.loader(split)
        batch = next(loader.batches(0, 0) if split == "train" else iter(loader))
        shapes = [f"{key} {tuple(value.shape)}" for key, value in batch.items() if is_tensor(value)]
        yield f"data    {split}: {len(loader.dataset):,} items; a batch: {', '.join(shapes)}"
    yield from _steps(runner) if train else ()


def _steps(runner: SoftmaskRunner) -> Iterator[str]:
    times: list[float] = []
    for seconds in itertools.islice(timed_steps(runner), STEPS):
        times.append(seconds)
        if sum(times) > SECONDS:
            break
    if runner.bad_steps.total:
        raise UserError(
            f"{runner.bad_steps.total} of {len(times)} steps had numbers that are not finite: see "
            "the samples named above, or lower run.init_lr"
        )
    terms = ", ".join(f"{name} {value:.3g}" for name, value in runner.meter.drain().items())
    step = statistics.median(times[1:] or times)
    yield f"step    {step:.3g} s: {terms}"
    whole = timedelta(seconds=round(step * runner.total_steps))
    yield f"time    about {whole} for {runner.total_steps:,} steps, besides evaluation"
    if runner.cuda_enabled:
        used, there = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
        yield f"memory  {used / 2**30:.1f} of {there / 2**30:.1f} GiB on the GPU"
    elif sys.platform == "linux":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        yield f"memory  {used / 2**30:.1f} GiB, besides data-loading processes"
