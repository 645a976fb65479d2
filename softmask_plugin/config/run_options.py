"""Schema of a YAML's ``run:`` section: every key, its default, its meaning and its range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite, nan
from typing import Any, NamedTuple, get_args

from omegaconf import ListConfig

from softmask_plugin.errors import UserError, suggest
from softmask_plugin.soft_mask import Kind

Check = Callable[[str, Any], Any]  # gets a key's place and value; returns it, or raises UserError

# In place of a default
NEEDED = "needed"
NEEDED_TO_TRAIN = "needed to train"


def must_be(what: str, accepts: Callable[[Any], bool], kind: type | None = None) -> Check:
    """Accept some values only, which ``what`` describes; numbers, also text, become a ``kind``."""

    def check(where: str, value: Any) -> Any:
        if not accepts(value):
            raise UserError(f"{where} is {value!r}: it must be {what}")
        return kind(float(value)) if kind and isinstance(value, (str, float)) else value

    return check


def whole(least: int, most: float = inf, null: bool = True) -> Check:
    """Accept whole numbers in a range, and null unless ``null`` is false."""
    allowed = f"of at least {least}" if most == inf else f"in [{least}, {most}]"

    def accepts(value: Any) -> bool:
        count = _number(value)
        return (null and value is None) or (count % 1 == 0 and least <= count <= most)

    return must_be(f"a whole number {allowed}", accepts, int)


def _number(value: Any) -> float:
    """A finite number, also as text (YAML's 1e-4); NaN for anything else."""
    try:
        found = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return nan
    return found if isfinite(found) else nan


number = must_be("a number", lambda value: isfinite(_number(value)), float)
amount = must_be("a number >= 0", lambda value: value is None or _number(value) >= 0, float)
positive = must_be("a number above 0", lambda value: _number(value) > 0, float)
flag = must_be("true or false", lambda value: isinstance(value, bool))
project = must_be("true, false or a project's name", lambda value: isinstance(value, (bool, str)))
folder = must_be("the path of a folder", lambda value: isinstance(value, str))
names = must_be(
    "a list of names, such as [val]",
    lambda value: isinstance(value, ListConfig) and all(isinstance(name, str) for name in value),
)

factors = must_be(
    "a section of numbers above 0, such as {text_encoder: 0.3}",
    lambda value: (
        value is None
        or (isinstance(value, Mapping) and all(_number(each) > 0 for each in value.values()))
    ),
)


def one_of(*words: str) -> Check:
    """Accept some words only."""

    def check(where: str, value: Any) -> Any:
        if value not in words:
            raise UserError(f"{where} is '{value}': {suggest(str(value), words)}")
        return value

    return check


class Key(NamedTuple):
    """A key: its default, its meaning, and the check of its value."""

    default: Any
    meaning: str
    check: Check = lambda where, value: value  # whatever uses the value checks it


RUN: dict[str, Key] = {
    # What to run
    "task": Key(
        NEEDED,
        "task to train and measure: one of LAVIS's, `softmask_grounding` or `softmask_foils`",
    ),
    "runner": Key("runner_base", "`softmask_runner`, or LAVIS's `runner_base` or `runner_iter`"),
    "evaluate": Key(False, "test only, without training", flag),
    "output_dir": Key(NEEDED, "folder in which each run creates its own", folder),
    "seed": Key(NEEDED, "random seed, 0 to 4294967295", whole(0, 2**32 - 1)),
    "device": Key(NEEDED, "`cpu` or `cuda`"),
    # Data
    "train_splits": Key(
        NEEDED_TO_TRAIN,
        "splits to train on: `[train]`",
        must_be("[train], or [] to test only", lambda value: value in ([], ["train"])),
    ),
    "valid_splits": Key(
        [], "splits to validate on after each epoch; the first picks the best checkpoint", names
    ),
    "test_splits": Key(
        [], "splits to test on after training, with the best checkpoint if one was picked", names
    ),
    "batch_size_train": Key(NEEDED, "items per step in each process, 1 or more", whole(1)),
    "batch_size_eval": Key(NEEDED, "items per evaluation batch in each process", whole(1)),
    "num_workers": Key(NEEDED, "data-loading processes for each training process", whole(0)),
    "train_dataset_ratios": Key(
        None,
        "sampling weight of each data set, such as `{coco: 2, mine: 1}`: the items of a step all "
        "come from one of them; null: each item once per epoch",
    ),
    "keep_features": Key(
        False,
        "compute a frozen `model.vit.backbone`'s features of each image once, without "
        "distortions, and keep them in memory",
        flag,
    ),
    # Training
    "max_epoch": Key(None, "passes over the training data; needed unless `max_steps` is", whole(0)),
    "max_steps": Key(
        None,
        "optimizer steps after which training ends, if `max_epoch` does not end it before; "
        "`softmask_cosine_lr` spans them",
        whole(1),
    ),
    "max_iters": Key(None, "training steps; `runner_iter` only, in place of `max_epoch`", whole(1)),
    "iters_per_inner_epoch": Key(None, "steps that `runner_iter` counts as an epoch", whole(1)),
    "lr_sched": Key(
        NEEDED_TO_TRAIN,
        "learning-rate schedule: `softmask_cosine_lr` (warm-up, then a cosine down to `min_lr`, "
        "updated every step), or LAVIS's `linear_warmup_cosine_lr` or `linear_warmup_step_lr`",
    ),
    "init_lr": Key(NEEDED_TO_TRAIN, "highest learning rate, reached after the warm-up", amount),
    "min_lr": Key(NEEDED_TO_TRAIN, "final learning rate", amount),
    "warmup_lr": Key(
        -1, "learning rate of the first step; -1: 0, with LAVIS's schedules `init_lr`", number
    ),
    "warmup_steps": Key(0, "optimizer steps of the warm-up", whole(0, null=False)),
    "lr_decay_rate": Key(None, "factor per epoch of `linear_warmup_step_lr`", amount),
    "lr_scale": Key(
        None,
        "factor of the learning rate for each part of the model, by a name in its parameters' "
        "names, such as `{text_encoder: 0.3, crossattention: 1}`: of several in a name, the "
        "innermost counts; null: one rate for all",
        factors,
    ),
    "weight_decay": Key(NEEDED_TO_TRAIN, "weight decay of matrices; others have none", amount),
    "beta2": Key(
        0.999,
        "AdamW's beta2",
        must_be("a number in [0, 1)", lambda value: 0 <= _number(value) < 1, float),
    ),
    "accum_grad_iters": Key(
        1, "batches per optimizer step; gradients are averaged", whole(1, null=False)
    ),
    "clip_grad_norm": Key(
        None,
        "largest gradient norm; null: no clipping",
        must_be("a number above 0", lambda value: value is None or _number(value) > 0, float),
    ),
    "max_bad_steps": Key(
        10,
        "steps skipped in a row (non-finite loss or gradient) that end the run",
        whole(1, null=False),
    ),
    # Speed and repeatability
    "amp": Key(
        False,
        "mixed precision: `auto` (bf16 where the device has instructions for it, else fp16 on CUDA "
        "and none on a CPU), `true` (fp16 on CUDA, bf16 on a CPU), `bf16` or `fp16`",
        must_be(
            "auto, true, false, bf16 or fp16",
            lambda value: isinstance(value, bool) or value in ("auto", "bf16", "fp16"),
        ),
    ),
    "compile": Key(
        False,
        "`true`: compile the image encoders with torch.compile, which pays on GPUs only; or the "
        "name of a torch.compile backend",
    ),
    "deterministic": Key(False, "demand repeatable kernels of torch, on CUDA too", flag),
    # Checkpoints
    "resume_ckpt_path": Key(
        None,
        "checkpoint to resume from; `auto`: resume in the newest folder below `output_dir` that "
        "has a checkpoint and no living process, or start anew if there is none",
    ),
    "save_every_steps": Key(
        None, "optimizer steps between checkpoints, besides those after each epoch", whole(1)
    ),
    "keep_checkpoints": Key(2, "number of checkpoints kept, besides the best; null: all", whole(1)),
    # Logging
    "log_freq": Key(50, "optimizer steps between lines of metrics.jsonl", whole(1, null=False)),
    "panel_every": Key(
        None,
        "optimizer steps between pictures of the soft mask, `masks/step_N.png`, besides the one at "
        "the end of each epoch; null: none",
        whole(1),
    ),
    "tensorboard": Key(True, "also log to TensorBoard, if it is installed", flag),
    "wandb": Key(False, "`true` or a project's name: log to Weights & Biases", project),
    # Several processes
    "distributed": Key(False, "whether there are several; set by the command", flag),
    "dist_timeout": Key(1800, "seconds that a process waits for another", positive),
    "find_unused_parameters": Key(False, "passed to torch's DistributedDataParallel", flag),
    "use_dist_eval_sampler": Key(
        True,
        "split evaluation data between processes; retrieval needs `false`, since each process "
        "ranks the whole gallery",
        flag,
    ),
    "world_size": Key(1, "number of processes; with Slurm, set it above 1", whole(1, null=False)),
    "dist_url": Key(
        "env://", "where the processes meet; `env://`: as MASTER_ADDR and MASTER_PORT say"
    ),
    "dist_backend": Key(None, "nccl on CUDA, gloo on CPU; set by the command"),
    "rank": Key(None, "number of the process; set by the command"),
    "gpu": Key(None, "number of the process's device; set by the command"),
    # Retrieval
    "k_test": Key(
        128,
        "candidates per query that `rank_by` proposes and ITM re-ranks; 0: none",
        whole(0, null=False),
    ),
    "rank_by": Key(
        "itc",
        "similarity that ranks: ITC's cosine (`itc`), or the mean cosine of a caption's words with "
        "what they find in the image (`words`), for models trained with `local_weight` and "
        "`local_negatives: batch`",
        one_of("itc", "words"),
    ),
    "rerank_scoring": Key(
        "itm+itc",
        "score that ranks the candidates: the matching logit plus the similarity (`itm+itc`, as in "
        "LAVIS) or plus its logit, as trained: over the temperature (`itm+logit`), or alone "
        "(`itm`, as in ALBEF)",
        one_of("itm+itc", "itm+logit", "itm"),
    ),
    "rerank_memory": Key(1.0, "device memory for the pairs that are scored at once, GiB", positive),
    # Other tasks
    "grounding_alpha": Key(
        0.5,
        "`softmask_grounding`: a box's score is the map's sum in it over area^alpha; 0 favours "
        "large boxes, 1 small ones",
        must_be("a number >= 0", lambda value: _number(value) >= 0, float),
    ),
    "foil_mask": Key(
        "none",
        "`softmask_foils`: mask of the changed word through which images are seen: `none`, or a "
        "kind of `soft_mask.kind`",
        one_of("none", *get_args(Kind)),
    ),
    "inference_method": Key("rank", "VQA: `rank` given answers; LAVIS's models also `generate`"),
    "num_ans_candidates": Key(
        128,
        "VQA: answers compared in full, those with the likeliest first words",
        whole(1, null=False),
    ),
    "prompt": Key("", "VQA: text before each question, for LAVIS's models"),
    "num_beams": Key(3, "beams of LAVIS's models that generate text", whole(1, null=False)),
    "max_len": Key(10, "greatest length of generated text, tokens", whole(1, null=False)),
    "min_len": Key(1, "least length of generated text, tokens", whole(0, null=False)),
    "report_metric": Key(True, "captioning: whether LAVIS scores the captions", flag),
}


def setting(run: Any, key: str) -> Any:
    """The value of a key in a ``run:`` section, checked, or its default."""
    return RUN[key].check(f"run.{key}", run[key]) if key in run else RUN[key].default


def check_values(run: Any) -> None:
    """Raise UserError if a known key of a ``run:`` section has a bad value. Texts of numbers, such
    as ``${oc.env:NAME}`` gives, become numbers."""
    for key in run:
        if key in RUN:
            run[key] = setting(run, key)
