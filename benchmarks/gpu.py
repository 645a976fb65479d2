"""The CUDA rows: pairs per second of ours in bf16 against LAVIS's own with ``amp: True`` (fp16),
and the share of the card's matrix rate that a step reaches. Without a card only the small setting
runs, in bf16 on the CPU."""

from __future__ import annotations

import gc
import logging
import statistics

import torch

from benchmarks.harness import Row, alternate, compare, timed
from benchmarks.step import Trainer

BATCH, LARGEST = 64, 4096


def matrix_rate(device: str, size: int) -> float:
    """TFLOP/s of the product of two bf16 matrices: median of ten."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = statistics.median(timed(lambda: a @ a) for _ in range(10))
    return 2 * size**3 / seconds / 1e12


def largest(name: str, captions: str | None, dtype: torch.dtype) -> tuple[int, float]:
    """The largest batch that fits, found by doubling, and its pairs per second."""
    size, speed = BATCH, 0.0
    while size <= LARGEST:
        try:
            trainer = Trainer(name, False, captions, size, "cuda", dtype, batches=2)
            trainer.step()
        except torch.cuda.OutOfMemoryError:
            break
        speed = size / statistics.median(trainer.step() for _ in range(5))
        size *= 2
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
    return size // 2, speed


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure all rows."""
    cuda = torch.cuda.is_available()
    if not cuda and not small:
        logging.warning("no CUDA card: the rows for it are left out")
        return []
    device, size = ("cuda", BATCH) if cuda else ("cpu", 8)
    theirs = torch.float16 if cuda else torch.bfloat16  # LAVIS's amp
    trainers = {
        "ours": Trainer("ours", small, captions, size, device, torch.bfloat16),
        "lavis": Trainer("lavis", small, captions, size, device, theirs),
    }
    if cuda:
        trainers["compiled"] = Trainer("ours", small, captions, size, device, torch.bfloat16)
        trainers["compiled"].model.visual_encoder.compile()
        trainers["compiled"].model.visual_encoder_m.compile()
    times = alternate({name: one.step for name, one in trainers.items()}, rounds, "mixed precision")
    speeds = {name: [size / seconds for seconds in mine] for name, mine in times.items()}

    def row(name: str, mine: str) -> Row:
        target = {"target": 2.5, "higher_is_better": True}
        return compare(name, "pairs/s", speeds[mine], speeds["lavis"], **target)

    rows = [row(f"{device}, mixed precision, batch {size}", "ours")]
    if cuda:
        rows.append(row(f"the same with compiled image encoders, batch {size}", "compiled"))
    rate = matrix_rate(device, 8192 if cuda else 512)
    reached = trainers["ours"].flops() / 1e3 * statistics.median(speeds["ours"])
    rows.append(Row("share of the measured matrix rate", "TFLOP/s", reached, rate))
    if cuda and not small:
        trainers.clear()
        (batch, ours), (their_batch, lavis) = (
            largest(name, captions, dtype)
            for name, dtype in (("ours", torch.bfloat16), ("lavis", theirs))
        )
        if ours and lavis:
            note = f"ours at batch {batch}, LAVIS at {their_batch}"
            name = "the largest batch of each"
            rows.append(Row(name, "pairs/s", ours, lavis, 2.5, True, note=note))
    return rows
