"""A training step of ours against LAVIS's albef_pretrain: time, FLOPs and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import albef_pretrain
from benchmarks.harness import Row, Worker, alternate, compare, peak_memory, tensor_peak, timed
from benchmarks.material import batch, build, texts
from softmask_plugin.host.environment import has_bf16


class Variant(NamedTuple):
    """Options of a step of ours."""

    mask: bool = True  # soft_mask.enabled
    score: str = "match"  # soft_mask.score
    shared: bool = True  # text.shared
    patch_dropout: float = 0.0  # vit.patch_dropout
    bf16: bool = False  # run.amp


VARIANTS = {
    "full": Variant(),
    "clean text": Variant(shared=False),
    "no mask": Variant(mask=False),
    "own maps": Variant(score="word"),
    "own maps, clean text": Variant(score="word", shared=False),
    "half the patches": Variant(patch_dropout=0.5),
    "bf16": Variant(bf16=True),
    "half the patches, bf16": Variant(patch_dropout=0.5, bf16=True),
}


def measurable(names: Iterable[str], small: bool) -> list[str]:
    """The variants but those in bf16 if this CPU emulates it: a step of full size takes minutes."""
    fast = small or has_bf16(torch.device("cpu"))
    return [name for name in names if fast or not VARIANTS[name].bf16]


HOLES = "includes all of Python and LAVIS, and holes that the system's allocator leaves"


class Trainer:
    """A model with its optimizer that takes steps on the same batches as its rival.

    Args:
        name: ``ours`` or ``lavis``.
        small, captions: As in ``build``.
        size: Pairs in a batch.
        device: Device to train on.
        dtype: Type of mixed precision, bf16 or fp16; None: none.
        make: Function of ``small`` and ``captions`` that builds ours.
        twin: Function that makes its rival from ours.
        batches: Number of different batches.
    """

    def __init__(
        self,
        name: str,
        small: bool,
        captions: str | None,
        size: int,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        make: Callable[..., Any] = build,
        twin: Callable[..., Any] = albef_pretrain,
        batches: int = 16,
    ) -> None:
        model = make(small, captions)
        many = texts(model, captions, batches * size)
        self.batches = [batch(model, many[i::batches], i, device) for i in range(batches)]
        self.model: Any = (model if name == "ours" else twin(model)).train().to(device)
        self.device = device
        self.autocast = torch.autocast(device, dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        # As the two runners create it
        self.optimizer = torch.optim.AdamW(
            _groups(self.model), lr=1e-5, fused=True if name == "ours" else None
        )
        self.count = 0

    def choose(self, variant: str | None) -> None:
        """Set ours up as one of VARIANTS; None: leave it as it is."""
        if variant is None:
            return
        options, wanted = self.model.options, VARIANTS[variant]
        options.soft_mask.enabled, options.soft_mask.score = wanted.mask, wanted.score
        if hasattr(options, "text"):  # BLIP masks no captions
            options.text.shared = wanted.shared
        self.model.visual_encoder.patch_dropout = wanted.patch_dropout
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=wanted.bf16)

    def step(self, variant: str | None = None) -> float:
        """Take one step; return its seconds."""
        self.choose(variant)
        return timed(self._step)

    def _step(self) -> None:
        samples = self.batches[self.count % len(self.batches)]
        self.count += 1
        with self.autocast:
            loss = self.model(samples)["loss"]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def flops(self, variant: str | None = None) -> float:
        """GFLOPs per pair, forward and backward: mean over two batches."""
        self.choose(variant)
        size, counts = len(self.batches[0]["text_input"]), []
        for samples in self.batches[:2]:
            with FlopCounterMode(display=False) as counter:
                self.model(samples)["loss"].backward()
            self.optimizer.zero_grad()
            counts.append(counter.get_total_flops() / size / 1e9)
        return statistics.mean(counts)

    def memory(self) -> tuple[float, float]:
        """Peak memory of this process so far, and of the tensors of one more step; GiB."""
        state = [t for one in self.optimizer.state.values() for t in one.values()]
        kept = [*self.model.parameters(), *self.model.buffers(), *state]
        return peak_memory(), tensor_peak(self._step, kept)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, as in LAVIS's runner."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure a training step: time and FLOPs."""
    ours, lavis = (Trainer(name, small, captions, 8) for name in ("ours", "lavis"))
    subjects = {name: partial(ours.step, name) for name in measurable(VARIANTS, small)}
    times = alternate({**subjects, "lavis": lavis.step}, rounds, "training steps")
    flops = {name: ours.flops(name) for name in ("full", "clean text", "half the patches")}
    lavis_flops = lavis.flops()

    def row(name: str, target: float, a: str, b: str) -> Row | None:
        return compare(name, "s", times[a], times[b], target=target) if a in times else None

    rows = [
        row("step: time", 0.72, "full", "lavis"),
        Row("step: FLOPs per pair", "G", flops["full"], lavis_flops, 0.72),
        row("step with clean text for ITC and ITM: time", 0.80, "clean text", "lavis"),
        Row("step with clean text: FLOPs per pair", "G", flops["clean text"], lavis_flops),
        row("step with half of the patches left out: time", 0.45, "half the patches", "lavis"),
        Row("half of the patches: FLOPs per pair", "G", flops["half the patches"], lavis_flops),
        row("step in bf16: time", 0.36, "bf16", "lavis"),
        row("step in bf16 against ours in float32", 0.52, "bf16", "full"),
        row("half of the patches in bf16: time", 0.30, "half the patches, bf16", "lavis"),
        row("soft mask: our step with it against without", 1.08, "full", "no mask"),
        row("the word's own map against that of the match", 1.05, "own maps", "full"),
        row("the same with clean text", 1.05, "own maps, clean text", "clean text"),
    ]
    return [each for each in rows if each]


def run_memory(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure the memory of training steps, each side in a process of its own.

    Another allocator shows here what it saves and what it costs: ``LD_PRELOAD=libjemalloc.so.2``.
    """
    ours, lavis = (Worker(Trainer, name, small, captions, 8) for name in ("ours", "lavis"))
    subjects = {"ours": partial(ours.call, "step", "full"), "lavis": partial(lavis.call, "step")}
    times = alternate(subjects, rounds, "memory")
    sides = []
    for worker in (ours, lavis):  # the profiler needs more: not for both at once
        sides.append(worker.call("memory"))
        worker.close()
    process, tensors = zip(*sides, strict=True)
    return [
        Row("step: peak memory of tensors", "GiB", *tensors, 0.75),
        Row("step: peak memory of the process", "GiB", *process, 0.75, note=HOLES),
        compare("step beside the other process: time", "s", times["ours"], times["lavis"]),
    ]
