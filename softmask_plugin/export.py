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

LAYOUTS = ("lavis", "albef")
PLAIN = "model.pth"  # the weights in one of these
# Keys of a model's section that name the exporter's files, or decide whether those may run code
_OWN = {
    *("pretrained", "finetuned", "load_pretrained", "load_finetuned", "vit_weights"),
    *("bert_weights", "tokenizer", "trust_checkpoint"),
}
_TRAINING = re.compile(r"\w+_m\.|\w*queue\w*$")  # momentum copies and queues

CARD = """\
---
{data}
---

# {name}

A `{arch}` of type `{type}`, {count:,} weights, exported by
[softmask_plugin](https://arxiv.org/abs/2304.00719), which adds SoftMask++ to Salesforce LAVIS.
{data_sets}{license}

## Use

{use}
{metrics}"""
USE = """\
Put the hub's name in place of `FOLDER`, or the path of this folder:

```python
from softmask_plugin.models import {model}

model = {model}.from_pretrained("FOLDER")
```

The commands and YAML files of softmask_plugin take the path, or `hub:` and the hub's name, as a
checkpoint.
"""
USE_PLAIN = """\
`{file}` holds `{{"model": state_dict}}` with the keys of {layout}, momentum encoders and queues
included; `vocab.txt` is the vocabulary. Captions were trained {sep} a [SEP] at their end, which
LAVIS's tokenizers add and ALBEF's leave out.
"""


def export(
    trained: str | Path, folder: str | Path, license: str | None = None, layout: str | None = None
) -> Path:
    """Write weights, ``config.yaml``, ``vocab.txt`` and a model card, ``README.md``.

    Paths of the machine that trained stay out of it. Without a layout, momentum encoders and queues
    do as well, and ``SoftMaskBase.from_pretrained`` reads the folder back.

    Args:
        trained: A run's folder or a checkpoint that records its configuration.
        folder: A new or empty folder.
        license: Name of the weights' license for the card, such as apache-2.0.
        layout: ``lavis``: a ``.pth`` with LAVIS's keys; ``albef``: with those of ALBEF's own code,
            which has token types as well.

    Raises:
        UserError: The folder has files, the checkpoint says not enough about its model, or a weight
            is NaN or infinite.
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
    folder.mkdir(parents=True, exist_ok=True)
    weights, own_config, vocabulary = EXPORTED
    if layout is None:
        write_whole(folder / weights, lambda path: save_file(state, path, {"format": "pt"}))
    else:
        write_whole(folder / PLAIN, lambda path: torch.save({"model": state}, path))
    OmegaConf.save(OmegaConf.create(_shared_config(config, checkpoint)), folder / own_config)
    (folder / vocabulary).write_text("\n".join([*words, ""]), "utf-8")
    (folder / "README.md").write_text(
        _card(checkpoint, config, folder.name, state, license, layout), "utf-8"
    )
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


def _shared_config(config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The model and the processors, without data and places."""
    model = {key: value for key, value in config["model"].items() if key not in _OWN}
    slots = ("vis_processor", "text_processor")
    datasets = {
        name: {slot: section[slot] for slot in slots if section.get(slot)}
        for name, section in (config.get("datasets") or {}).items()
    }
    return {"model": {**model, "sep_token": checkpoint.sep_token}, "datasets": datasets}


def _card(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    name: str,
    state: StateDict,
    license: str | None,
    layout: str | None,
) -> str:
    arch, tags = config["model"]["arch"], ["softmask", "albef", "vision-language"]
    if layout is None:
        use = USE.format(model=registry.get_model_class(arch).__name__)
    else:
        code = {"lavis": "LAVIS's ALBEF", "albef": "ALBEF's own code"}[layout]
        sep = "with" if checkpoint.sep_token else "without"
        use = USE_PLAIN.format(file=PLAIN, layout=code, sep=sep)
    names = ", ".join(f"`{each}`" for each in config.get("datasets") or ())
    return CARD.format(
        data=ModelCardData(license=license, library_name="softmask_plugin", tags=tags),
        name=name,
        arch=arch,
        type=config["model"].get("model_type"),
        count=sum(tensor.numel() for tensor in state.values()),
        data_sets=f"Trained on {names}. " if names else "",
        license=f"License: {license}." if license else "No license is given.",
        use=use.rstrip(),
        metrics=_metrics(checkpoint),
    )


def _metrics(checkpoint: Checkpoint) -> str:
    """A table of what the run measured with these weights, if it is beside them."""
    folder, training = checkpoint.path.parent, checkpoint.training
    if not (folder / "metrics.jsonl").is_file() or "progress" not in training:
        return ""
    progress = Progress.of(training)
    whole = progress.epoch - 1 if progress.taken == 0 else None
    epoch = progress.best_epoch if checkpoint.path.name == BEST else whole
    records = [each for each in read_metrics(folder) if each["split"] != "train"]
    found = {each["split"]: numbers_of(each) for each in records if each.get("epoch") == epoch}
    if epoch is None or not found:
        return ""
    rows = [f"| {s} | {name} | {v:.4g} |" for s, each in found.items() for name, v in each.items()]
    return "\n".join(
        ["", "## Metrics", "", "| split | metric | value |", "|---|---|---|", *rows, ""]
    )
