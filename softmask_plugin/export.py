"""``softmask export``: a trained model as a folder to share, or in a layout for others' code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from lavis.common.registry import registry
from omegaconf import OmegaConf
from safetensors.torch import save_file

from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import (
    BEST,
    EXPORTED,
    TOKEN_TYPES,
    Checkpoint,
    StateDict,
    open_checkpoint,
    require_sound,
)
from softmask_plugin.files.whole import write_whole
from softmask_plugin.models.checkpoint_keys import POSITIONS, fold_token_types
from softmask_plugin.report.records import read_metrics
from softmask_plugin.runners.meter import numbers_of
from softmask_plugin.runners.resume import Progress

# Keys of a model's section that name files of its run, or say whether those may run code
_OWN = "pretrained finetuned load_pretrained load_finetuned vit_weights bert_weights".split()
_OWN += ["tokenizer", "trust_checkpoint"]
RANKING = ("k_test", "rank_by", "rerank_scoring")  # of a run, which a search follows
_TRAINING = re.compile(r"\w+_m\.|\w*queue\w*$")  # momentum copies and queues

CARD = """\
---
{data}
---

# {name}

A `{arch}` of type `{type}`, exported by softmask_plugin, which adds
[SoftMask++](https://arxiv.org/abs/2304.00719) to Salesforce LAVIS. Data: {data_sets}. License:
{license}.

{use}
{metrics}"""
USE = """\
`softmask_plugin.models.{model}.from_pretrained` loads it by the path of this folder or by its name
on the hub. Commands and YAML files take the path, or `hub:` and the name, as a checkpoint."""
USE_PLAIN = """\
`model.pth` holds `{{"model": state_dict}}` with the keys of {layout}'s own classes, momentum
encoders and queues included. Captions were trained {sep} [SEP] at their end: LAVIS adds it, ALBEF
does not."""


def export(
    trained: str | Path, folder: str | Path, license: str | None = None, layout: str | None = None
) -> Path:
    """Write weights, ``config.yaml``, ``vocab.txt`` and a model card, ``README.md``.

    Paths of the run stay out of it. Without a layout, momentum encoders and queues do as well, and
    ``SoftMaskBase.from_pretrained`` reads the folder back.

    Args:
        trained: A run's folder, or a checkpoint that records its configuration and vocabulary.
        folder: A new or empty folder.
        license: Of the weights, for the card, such as apache-2.0.
        layout: ``lavis``: a ``.pth`` with LAVIS's keys; ``albef``: with those of ALBEF's own code,
            which has token types as well.

    Raises:
        UserError: The folder has files, the checkpoint does not say which model it is of, or a
            weight is NaN or infinite.
    """
    checkpoint, folder = open_checkpoint(trained), Path(folder)
    config, words = checkpoint.config, checkpoint.vocabulary
    if config is None or config["model"].get("arch") not in registry.list_models() or not words:
        raise UserError(
            f"{checkpoint.path} does not say which model it is of, or has no vocabulary: export a "
            "run of softmask_runner, or put its config.yaml and vocab.txt beside it"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} has files already: name a new folder")
    state = _state(checkpoint, layout)
    require_sound(state, checkpoint.path)
    metrics = _metrics(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    weights, shared, vocabulary = (folder / name for name in EXPORTED)
    if layout is None:
        write_whole(weights, lambda path: save_file(state, path, {"format": "pt"}))
    else:
        write_whole(folder / "model.pth", lambda path: torch.save({"model": state}, path))
    model = {key: value for key, value in config["model"].items() if key not in _OWN}
    data_sets = {  # their processors, and the names of their classes
        name: {k: v for k, v in section.items() if k.endswith("_processor") or k == "labels"}
        for name, section in (config.get("datasets") or {}).items()
    }
    run = config.get("run") or {}
    sections = {
        "model": {**model, "sep_token": checkpoint.sep_token},
        "datasets": data_sets,
        "run": {key: run[key] for key in RANKING if key in run},
    }
    OmegaConf.save(OmegaConf.create(sections), shared)
    vocabulary.write_text("\n".join([*words, ""]), "utf-8")
    if layout is None:
        weights.chmod(vocabulary.stat().st_mode)  # safetensors lets only the owner read
    card = CARD.format(
        data=ModelCardData(license=license, library_name="softmask_plugin", tags=["softmask"]),
        name=folder.resolve().name,
        arch=model["arch"],
        type=model.get("model_type"),
        data_sets=", ".join(data_sets) or "not recorded",
        license=license or "none given",
        use=(USE if layout is None else USE_PLAIN).format(
            model=registry.get_model_class(model["arch"]).__name__,
            layout={"lavis": "LAVIS", "albef": "ALBEF"}.get(str(layout)),
            sep="with" if checkpoint.sep_token else "without",
        ),
        metrics=metrics,
    )
    (folder / "README.md").write_text(card, "utf-8")
    return folder


def _state(checkpoint: Checkpoint, layout: str | None) -> StateDict:
    if layout is None:  # copies: the format has no tied weights
        kept = {k: v for k, v in checkpoint.state.items() if not _TRAINING.match(k)}
        return {k: v.clone(memory_format=torch.contiguous_format) for k, v in kept.items()}
    state = fold_token_types(checkpoint.state, checkpoint.path)
    if layout == "albef":
        for key in [key for key in state if key.endswith(POSITIONS)]:
            types = state[key].new_zeros(2, state[key].shape[1])  # they are in the positions
            state[key.removesuffix(POSITIONS) + TOKEN_TYPES] = types
    return state


def _metrics(checkpoint: Checkpoint) -> str:
    """A table of what the run measured with these weights, if that is beside them."""
    folder, training = checkpoint.path.parent, checkpoint.training
    if not (folder / "metrics.jsonl").is_file() or "progress" not in training:
        return ""
    progress = Progress.of(training)
    whole = progress.epoch - 1 if progress.taken == 0 else None
    epoch = progress.best_epoch if checkpoint.path.name == BEST else whole

    def is_of(record: dict[str, Any]) -> bool:
        if epoch is None:  # the run may have ended within an epoch, at this step
            return checkpoint.path.stem == f"checkpoint_{record['epoch']}_{record['step']}"
        return bool(record["epoch"] == epoch)

    rows = [
        f"| {record['split']} | {name} | {value:.4g} |\n"
        for record in read_metrics(folder)
        if record["split"] != "train" and is_of(record)
        for name, value in numbers_of(record).items()
    ]
    return "".join(["\n| split | metric | value |\n|---|---|---|\n", *rows]) if rows else ""
