"""Several processes against one: ``python -m benchmarks.workers``.

Two and four gloo processes train the small model with softmask_runner. Their state is compared with
each other and with a single process; collective operations are counted; a process is killed or
hangs, and the others must end within bounded time and say why.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.config import Config
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.tasks.base_task import BaseTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from omegaconf import OmegaConf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.material import SMALL, texts
from benchmarks.ranks import on_ranks
from softmask_plugin.config.options import ClassificationOptions, PretrainOptions, read_options
from softmask_plugin.files.whole import write_json
from softmask_plugin.models.classification import SoftMaskClassification
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.nn.fixed_draws import seed_draws
from softmask_plugin.runners import SoftmaskRunner

RUN: dict[str, Any] = {
    "device": "cpu",
    "seed": 7,
    "max_epoch": 1,
    "init_lr": 1e-3,
    "min_lr": 1e-4,
    "weight_decay": 0.02,
    "lr_sched": "softmask_cosine_lr",
    "num_workers": 0,
    "log_freq": 2,
    "batch_size_eval": 2,
    "train_splits": ["train"],
    "save_every_steps": 2,
    "keep_checkpoints": None,
}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}
SHAPE = {**SMALL, "bert": {**SMALL["bert"], **STILL}, "tokenizer": "scenes", "momentum": 0.9}
PATIENCE = 5.0  # seconds that a process waits for one that hangs
SIZE = 48  # pairs, where the same ones are shared differently


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    what: str  # was compared
    processes: int
    found: str  # in words
    good: bool  # whether it is as it should be


class Pairs(BaseDataset):
    """Random images with captions and labels, the same in every process."""

    def __init__(self, size: int, captions: list[str]) -> None:
        super().__init__()
        self.annotation = [{} for _ in range(size)]
        generator = torch.Generator().manual_seed(3)
        side = SMALL["image_size"]
        self.images = torch.randn(size, 3, side, side, generator=generator)
        self.captions = captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index],
            "text_input": self.captions[index % len(self.captions)],
            "image_id": index,
            "label": index % 2,
            "instance_id": str(index),
        }


def pretrain() -> SoftMaskPretrain:
    """The small model, with a queue size that is no multiple of a step's pairs."""
    torch.manual_seed(0)
    return SoftMaskPretrain(read_options(PretrainOptions, {**SHAPE, "queue_size": 50}))


def classifier() -> SoftMaskClassification:
    """The small model whose loss is a mean over independent samples."""
    torch.manual_seed(0)
    own = {key: value for key, value in SHAPE.items() if key not in ("embed_dim", "queue_size")}
    return SoftMaskClassification(read_options(ClassificationOptions, {**own, "num_classes": 2}))


def run(model: Any, folder: str | Path, size: int, batch: int, **more: Any) -> Any:
    """A runner over ``size`` pairs."""
    options = {**RUN, "output_dir": str(folder), "batch_size_train": batch, **more}
    config = Config.__new__(Config)
    config.config = OmegaConf.create({"run": options, "model": {}, "datasets": {}})
    pairs = Pairs(size, texts(model, None, 16))
    data = {"pairs": {"train": pairs, "val": pairs}}
    return SoftmaskRunner(config, BaseTask(), model, data, "run")


def each_step(runner: Any) -> Iterator[None]:
    """Take the steps of an epoch one at a time."""
    runner.model.train()
    batches = runner.train_loader.batches(0, 0)
    for first in range(0, len(runner.train_loader), runner.accum_grad_iters):
        yield runner.train_step(batches, 0, range(first, first + runner.accum_grad_iters))


# ---- The comparisons


def same_on_every_rank(processes: int, steps: int) -> Finding:
    """Weights, momentum copies and queues after each step."""

    def rank(number: int) -> list[str]:
        differing = []
        with TemporaryDirectory() as folder:
            size = steps * processes * 3 + 1  # the last item is left over
            runner = run(pretrain(), folder, size, 3)
            torch.manual_seed(number)  # launch seeds ranks differently, too
            runner._model.image_queue.normal_()
            for _ in each_step(runner):
                differing += _differing(runner._model.state_dict())
            pointer = int(runner._model.queue_ptr)
            if pointer != steps * processes * 3 % 50:
                differing.append(f"the queue is at {pointer}")
        return differing

    ended = on_ranks(processes, rank)
    bad = [str(end.result or end.error) for end in ended if end.result != []]
    what = f"weights, momentum copies and queues on every rank, after each of {steps} steps"
    return Finding(what, processes, "; ".join(bad) or "identical", not bad)


def _differing(state: dict[str, Tensor]) -> list[str]:
    """Names of tensors in which this rank differs from rank 0."""
    found = []
    for name, tensor in state.items():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        if not torch.equal(first, tensor):
            found.append(name)
    return found


def gradients_of_joined_batch(processes: int) -> Finding:
    """Independent samples: the gradients of one process with all of them."""
    together = on_ranks(processes, lambda rank: _gradients(classifier(), 3, 1))[0]
    (alone,) = on_ranks(1, lambda rank: _gradients(classifier(), 3 * processes, 1))
    what = "gradients of softmask_classification against one process with the joined batch"
    return _compared(what, processes, together, alone)


def gradients_of_shares(processes: int) -> Finding:
    """Pretraining, which contrasts and draws negatives within a process: the shares' mean."""
    together = on_ranks(processes, lambda rank: _gradients(pretrain(), 3, 1))[0]

    def alone(_: int) -> dict[str, Tensor]:
        parts = [_gradients_of_share(pretrain(), 3, rank, processes) for rank in range(processes)]
        return {name: torch.stack([p[name] for p in parts]).mean(dim=0) for name in parts[0]}

    (mean,) = on_ranks(1, alone)
    what = "gradients of softmask_pretrain against the mean of its shares on one process"
    return _compared(what, processes, together, mean)


def accumulated(processes: int) -> Finding:
    """Two accumulated batches against one of twice the size."""
    whole = on_ranks(processes, lambda rank: _gradients(classifier(), 4, 1))[0]
    halves = on_ranks(processes, lambda rank: _gradients(classifier(), 2, 2))[0]
    what = "gradients of two accumulated batches against one of twice the size"
    return _compared(what, processes, whole, halves)


def _gradients(model: Any, batch: int, accumulate: int) -> dict[str, Tensor]:
    """The gradients in a first step."""
    found: dict[str, Tensor] = {}
    with TemporaryDirectory() as folder:
        runner = run(model, folder, SIZE, batch, accum_grad_iters=accumulate)
        runner.optimizer.register_step_pre_hook(lambda *_: found.update(_copied_gradients(model)))
        next(each_step(runner))
    return found


def _gradients_of_share(model: Any, batch: int, rank: int, processes: int) -> dict[str, Tensor]:
    """The gradients of one rank's share of a first step, computed alone."""
    data = Pairs(SIZE, texts(model, None, 16))
    generator = torch.Generator().manual_seed(RUN["seed"])
    order = torch.randperm(SIZE, generator=generator).tolist()
    samples = data.collater([data[i] for i in order[rank::processes][:batch]])
    samples.update(epoch=0, iters=0, num_iters_per_epoch=SIZE // (batch * processes))
    seed_draws(RUN["seed"], rank, 0, 0)
    model.paced = True
    model.train()(samples)["loss"].backward()
    return _copied_gradients(model)


def _copied_gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _compared(what: str, processes: int, one: Any, other: Any) -> Finding:
    if one.error or other.error:
        return Finding(what, processes, one.error or other.error, False)
    scale = max(float(grad.abs().max()) for grad in other.result.values())
    worst = max(float((one.result[k] - g).abs().max()) for k, g in other.result.items()) / scale
    same = one.result.keys() == other.result.keys() and worst < 1e-5
    return Finding(what, processes, f"largest difference {worst:.1e} of the largest one", same)


def collectives(processes: int) -> Finding:
    """Operations between processes in a step after the first, of one batch and of three."""

    def rank(number: int) -> list[dict[str, int]]:
        counts = []
        for accumulate in (1, 3):
            with TemporaryDirectory() as folder:
                size = 3 * 3 * accumulate * processes
                runner = run(pretrain(), folder, size, 3, accum_grad_iters=accumulate)
                steps = each_step(runner)
                next(steps), next(steps)
                watched = profile(activities=[ProfilerActivity.CPU]) if number == 0 else None
                with watched or nullcontext():
                    next(steps)
                if watched and watched.profiler:  # its events() would take seconds
                    names = [event.name() for event in watched.profiler.kineto_results.events()]
                    counts.append(dict(Counter(n for n in names if n.startswith("gloo:"))))
        return counts

    one, three = on_ranks(processes, rank)[0].result
    said = ", ".join(f"{count} {name.removeprefix('gloo:')}" for name, count in one.items())
    what = "operations between processes in a step, of one batch and of three accumulated ones"
    kinds = {"gloo:all_reduce", "gloo:all_gather"}  # gradients; features for the queues
    return Finding(what, processes, f"{said}, both", one == three and one.keys() == kinds)


def bad_on_one(processes: int) -> Finding:
    """A NaN in one image of the last process: all skip that step, and the queues stay clean."""

    def rank(number: int) -> list[Any]:
        with TemporaryDirectory() as folder:
            runner = run(pretrain(), folder, 3 * processes * 4, 3)

            def spoil(_: Any, args: Any) -> None:
                if number == processes - 1 and runner.step == 1:
                    args[0]["image"][0, 0, 0, 0] = torch.nan

            runner.model.register_forward_pre_hook(spoil)
            runner.train()
            state = runner._model.state_dict()
            broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
            return [runner.bad_steps.total, int(state["queue_ptr"]), broken + _differing(state)]

    ended = on_ranks(processes, rank)
    expected = [1, 3 * processes * 3 % 50, []]
    bad = [end.error or str(end.result) for end in ended if end.result != expected]
    what = "a NaN in an image of one process"
    return Finding(what, processes, "; ".join(bad) or "all skip that step and no other", not bad)


def uneven_evaluation(processes: int) -> Finding:
    """Accuracy by LAVIS's task on a number of items that is no multiple of the processes."""
    with TemporaryDirectory() as folder:

        def rank(_: int) -> float | None:
            runner = run(classifier(), folder, 13, 2)
            runner.task = MultimodalClassificationTask()
            scores = runner.eval_epoch("val", "best", skip_reload=True)
            return float(scores["acc"]) if scores else None

        together, alone = on_ranks(processes, rank)[0], on_ranks(1, rank)[0]
    what = "accuracy on 13 items in batches of 2 against one process"
    if together.error or alone.error:
        return Finding(what, processes, together.error or alone.error, False)
    found = f"{together.result:.4f} and {alone.result:.4f}"
    return Finding(what, processes, found, together.result == alone.result)


def another_number(before: int, after: int) -> Finding:
    """A run is interrupted within an epoch and resumed with another number of processes."""
    with TemporaryDirectory() as name:
        folder, items = Path(name), 28

        def train(stop: int | None) -> list[int]:
            seen: list[int] = []
            runner = run(pretrain(), folder, items, 2, resume_ckpt_path="auto")

            def note(_: Any, args: Any) -> None:
                if stop is not None and runner.step == stop:
                    raise KeyboardInterrupt
                seen.extend(args[0]["image_id"].tolist())

            runner.model.register_forward_pre_hook(note)
            try:
                runner.train()
            except KeyboardInterrupt:
                dist.barrier()
            return seen

        first = on_ranks(before, lambda rank: train(2))
        second = on_ranks(after, lambda rank: train(None))
        what = f"resumed with {after} processes"
        for error in (end.error for end in (*first, *second) if end.error):
            return Finding(what, before, error, False)
        seen = sorted(i for end in (*first, *second) for i in end.result)
        last = torch.load(next(folder.glob("*/checkpoint_0.pth")), weights_only=True)
    whole = seen == list(range(items)) and last["progress"]["epoch"] == 1
    found = f"{len(set(seen))} of {items} items of the epoch, each once"
    return Finding(what, before, found, whole)


def gone(processes: int, how: str) -> Finding:
    """The last process is killed or hangs after its first step."""
    over = multiprocessing.get_context("fork").Semaphore(0)

    def rank(number: int) -> None:
        with TemporaryDirectory() as folder:
            runner = run(pretrain(), folder, 3 * processes * 4, 3)

            def fail(*_: Any) -> None:
                if number == processes - 1 and runner.step == 1:
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    over.acquire(timeout=3 * PATIENCE)  # until another one ends
                    os._exit(1)

            runner.model.register_forward_pre_hook(fail)
            try:
                runner.train()
            finally:
                over.release()

    *others, last = on_ranks(processes, rank, patience=PATIENCE)
    told = all("lost another one" in end.error and "\n" not in end.error for end in others)
    waited = max(end.seconds for end in others)
    what = f"a process is {how}" if how == "killed" else f"a process {how}"
    found = f"the others end within {waited:.0f} s, {'each in' if told else 'NOT in'} one line"
    return Finding(what, processes, found, told and waited < 3 * PATIENCE and last.status != 0)


def main(argv: list[str] | None = None) -> int:
    """Run all comparisons; return 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="number, default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    findings = list(examine(args.steps))
    if args.json:
        write_json(args.json, [asdict(finding) for finding in findings])
    return 0 if all(finding.good for finding in findings) else 1


def examine(steps: int) -> Iterator[Finding]:
    """Compare with two and with four processes, and print each finding."""
    checks: list[Any] = [
        check
        for n in (2, 4)
        for check in (
            (same_on_every_rank, n, steps),
            (gradients_of_joined_batch, n),
            (gradients_of_shares, n),
            (accumulated, n),
            (collectives, n),
            (bad_on_one, n),
            (uneven_evaluation, n),
            (gone, n, "killed"),
        )
    ]
    checks += [(another_number, 2, 1), (another_number, 1, 4), (another_number, 4, 2)]
    checks += [(gone, 2, "hangs")]
    for function, *args in checks:
        finding = function(*args)
        mark = "ok " if finding.good else "BAD"
        print(f"{mark} {finding.processes} processes: {finding.what}: {finding.found}", flush=True)
        yield finding


if __name__ == "__main__":
    sys.exit(main())
