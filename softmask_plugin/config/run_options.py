"""Every key of a YAML's ``run:`` section: its default, what it means, and what it may be.

Checks refuse other keys, runners take defaults from here, and the docs site shows the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Any, NamedTuple

from omegaconf import ListConfig, OmegaConf

from softmask_plugin.errors import UserError, suggest

Check = Callable[[str, Any], None]  # of a key's place and value; raises UserError

# In the place of a default
NEEDED = "needed"
NEEDED_TO_TRAIN = "needed to train"


def anything(where: str, value: Any) -> None:
    """Accept what is checked elsewhere: by the registry, by torch, or by its reader."""


def whole(least: float, most: float = inf, null: bool = True) -> Check:
    """Whole numbers in a range; or null, where that means something."""
    allowed = f"of at least {least}" if most == inf else f"in [{least}, {most}]"

    def check(where: str, value: Any) -> None:
        count = _number(value)
        if count is not None and count % 1 == 0 and least <= count <= most:
            return
        if value is None and null:
            return
        raise UserError(f"{where} is {value!r}: it must be a whole number {allowed}")

    return check


def number(where: str, value: Any) -> None:
    """Accept finite numbers, and null."""
    if value is not None and _number(value) is None:
        raise UserError(f"{where} is {value!r}: it must be a number")


def amount(where: str, value: Any) -> None:
    """Accept numbers that are not negative, and null."""
    size = _number(value)
    if value is not None and (size is None or size < 0):
        raise UserError(f"{where} is {value!r}: it must be a number >= 0")


def flag(where: str, value: Any) -> None:
    """Accept true and false."""
    if not isinstance(value, bool):
        raise UserError(f"{where} is {value!r}: it must be true or false")


def flag_or_project(where: str, value: Any) -> None:
    """Accept true, false and a text."""
    if not isinstance(value, (bool, str)):
        raise UserError(f"{where} is {value!r}: it must be true, false or a project's name")


def names(where: str, value: Any) -> None:
    """Accept a list of texts."""
    if not isinstance(value, ListConfig) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where} is {value!r}: it must be a list of names, such as [val]")


def folder(where: str, value: Any) -> None:
    """Accept a text."""
    if not isinstance(value, str):
        raise UserError(f"{where} is {value!r}: it must be the path of a folder")


class Key(NamedTuple):
    """A key: its default, what it means, and what accepts its value."""

    default: Any
    meaning: str
    check: Check = anything


RUN: dict[str, Key] = {
    # What to run
    "task": Key(NEEDED, "what is trained and measured: a task of LAVIS or `softmask_grounding`"),
    "runner": Key("runner_base", "`softmask_runner`, or LAVIS's `runner_base` or `runner_iter`"),
    "evaluate": Key(False, "test, do not train", flag),
    "output_dir": Key(NEEDED, "folder in which each run makes its own", folder),
    "seed": Key(NEEDED, "of all random draws; 0 to 4294967295", whole(0, 2**32 - 1)),
    "device": Key(NEEDED, "`cpu` or `cuda`"),
    # Data
    "train_splits": Key(NEEDED_TO_TRAIN, "`[train]`", names),
    "valid_splits": Key([], "measured after each epoch; the first picks the best one", names),
    "test_splits": Key([], "measured in the end, with the best checkpoint if there is one", names),
    "batch_size_train": Key(NEEDED, "items per process and step, 1 or more", whole(1)),
    "batch_size_eval": Key(NEEDED, "items per process, 1 or more", whole(1)),
    "num_workers": Key(NEEDED, "processes that load data, per process that trains", whole(0)),
    "train_dataset_ratios": Key(None, "share of each data set; LAVIS's `runner_iter` alone"),
    # Training
    "max_epoch": Key(None, "passes over the training data; needed, but for `max_iters`", whole(0)),
    "max_iters": Key(None, "steps of LAVIS's `runner_iter`, in place of `max_epoch`", whole(1)),
    "iters_per_inner_epoch": Key(None, "steps that `runner_iter` calls an epoch", whole(1)),
    "lr_sched": Key(
        NEEDED_TO_TRAIN,
        "`softmask_cosine_lr` (moves at every step), or one of LAVIS's: `linear_warmup_cosine_lr`, "
        "`linear_warmup_step_lr`",
    ),
    "init_lr": Key(NEEDED_TO_TRAIN, "learning rate after the warm-up, the highest", amount),
    "min_lr": Key(NEEDED_TO_TRAIN, "learning rate in the end", amount),
    "warmup_lr": Key(-1, "of the first step; -1: 0, or with LAVIS's schedules `init_lr`", number),
    "warmup_steps": Key(0, "optimizer steps of the warm-up", whole(0)),
    "lr_decay_rate": Key(None, "factor per epoch of `linear_warmup_step_lr`", amount),
    "weight_decay": Key(NEEDED_TO_TRAIN, "of matrices; biases and norms have none", amount),
    "beta2": Key(0.999, "of AdamW", amount),
    "accum_grad_iters": Key(1, "batches whose gradients are averaged for a step", whole(1)),
    "clip_grad_norm": Key(None, "largest norm of the gradient; null does not clip", amount),
    "max_bad_steps": Key(
        10,
        "so many skipped steps (losses or gradients not finite) end the run",
        whole(1, null=False),
    ),
    # Speed and repeatability
    "amp": Key(False, "mixed precision: `true` (fp16 on CUDA, bf16 on CPU), `bf16`, `fp16`"),
    "compile": Key(
        False,
        "`true` compiles the image encoders with torch.compile, for GPUs (a CPU gains nothing); or "
        "the name of one of torch's backends",
    ),
    "deterministic": Key(False, "ask torch for repeatable kernels, on CUDA too", flag),
    # Checkpoints
    "resume_ckpt_path": Key(
        None,
        "a checkpoint to go on from, or `auto`: go on in the newest folder below `output_dir` that "
        "has one and that no living process works in; without any, start",
    ),
    "save_every_steps": Key(
        None, "optimizer steps between checkpoints, beside those of epochs", whole(1)
    ),
    "keep_checkpoints": Key(2, "how many are kept, beside the best; null: all", whole(1)),
    # What a run tells
    "log_freq": Key(50, "optimizer steps between lines of metrics.jsonl", whole(1)),
    "panel_every": Key(
        None,
        "optimizer steps between pictures of what the soft mask hides, `masks/step_N.png`, beside "
        "one at the end of each epoch; null: none",
        whole(1),
    ),
    "tensorboard": Key(True, "write for TensorBoard too, where it is installed", flag),
    "wandb": Key(False, "`true` or a project's name: write for Weights & Biases", flag_or_project),
    # Several processes: torchrun sets what stands in no shipped file
    "distributed": Key(False, "whether there are several; set by the command", flag),
    "dist_timeout": Key(1800, "seconds that a process waits for another one", amount),
    "find_unused_parameters": Key(False, "as torch's DistributedDataParallel has it", flag),
    "use_dist_eval_sampler": Key(True, "processes share the data to be measured", flag),
    "world_size": Key(1, "number of processes; with Slurm, more than 1 asks for them", whole(1)),
    "dist_url": Key("env://", "where processes meet, with Slurm"),
    "dist_backend": Key(None, "nccl with CUDA, gloo on CPUs; set by the command"),
    "rank": Key(None, "number of the process; set by the command"),
    "gpu": Key(None, "number of its device; set by the command"),
    # Tasks
    "grounding_alpha": Key(0.5, "`softmask_grounding`: a box counts its map's sum over area^alpha"),
    "inference_method": Key("rank", "VQA: `rank` given answers; `generate` is for LAVIS's models"),
    "num_ans_candidates": Key(128, "VQA: answers compared in full, by their first words", whole(1)),
    "prompt": Key("", "VQA: text before each question, for LAVIS's models"),
    "num_beams": Key(3, "texts that are written in parallel", whole(1)),
    "max_len": Key(10, "tokens of a text that is written, at most", whole(1)),
    "min_len": Key(1, "tokens of a text that is written, at least", whole(0)),
    "report_metric": Key(True, "captioning: whether LAVIS measures the captions", flag),
    # LAVIS's vqa_reading_comprehension, which answers from captions of an image's patches
    "num_captions": Key(None, "captions of an image"),
    "num_captions_fid": Key(None, "captions that the reader takes at once"),
    "internal_bsz_fid": Key(None, "questions that the reader takes at once"),
    "cap_max_length": Key(None, "tokens of a caption, at most"),
    "cap_min_length": Key(None, "tokens of a caption, at least"),
    "num_patches": Key(None, "patches that captions are made of"),
    "block_num": Key(None, "layer whose map chooses the patches"),
    "top_k": Key(None, "a caption's next token is one of so many"),
    "top_p": Key(None, "or one of those with this share of the probability"),
    "repetition_penalty": Key(None, "above 1: words of a caption are repeated less"),
}


def check_values(run: Any) -> None:
    """Raise UserError where a key of a ``run:`` section has a value that it cannot have."""
    for key, value in run.items():
        if key in RUN:
            RUN[key].check(f"run.{key}", value)


def setting(run: Any, key: str) -> Any:
    """The value of a key in a ``run:`` section, or its default."""
    return run.get(key, RUN[key].default)


def _number(value: Any) -> float | None:
    """A finite number, or the text of one as YAML has it for 1e-4; otherwise None."""
    if isinstance(value, bool) or OmegaConf.is_config(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None


SCORINGS = ("itm+itc", "itm")


@dataclass(frozen=True)
class RerankOptions:
    """Keys of a YAML's ``run:`` section about retrieval scores, with their defaults.

    Raises:
        UserError: a value out of its range.
    """

    k_test: int = 128  # candidates of ITC that ITM re-ranks, per query
    rerank_scoring: str = "itm+itc"  # what ranks them: itm+itc as in LAVIS, itm as in ALBEF
    rerank_memory: float = 1.0  # GiB that the pairs scored at once may take on the device

    def __post_init__(self) -> None:
        if self.rerank_scoring not in SCORINGS:
            hint = suggest(str(self.rerank_scoring), SCORINGS)
            raise UserError(f"run.rerank_scoring is '{self.rerank_scoring}': {hint}")
        for key, kinds, noun in (
            ("k_test", int, "a whole number"),
            ("rerank_memory", (int, float), "a number"),
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < inf:
                raise UserError(f"run.{key} is {value}: it must be {noun} above 0")

    @classmethod
    def of(cls, run: Any) -> RerankOptions:
        """Read them from a ``run:`` section; other keys are not looked at."""
        keys = [field.name for field in fields(cls)]
        return cls(**{key: run.get(key) for key in keys if run.get(key) is not None})
