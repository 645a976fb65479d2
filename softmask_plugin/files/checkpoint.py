"""Open a checkpoint: its tensors and the configuration of its run, without running its code."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from lavis.common.utils import is_url
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import Tensor

from softmask_plugin.config.check import valid_yaml
from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.errors import UserError, reason_of, suggest
from softmask_plugin.files.download import fetch, from_hub
from softmask_plugin.files.packages import PACKAGED, packaged_file

StateDict = dict[str, Tensor]
ASSETS = PACKAGE / "assets"
SHIPPED = "shipped:"  # prefix of the weights that come with the package
HUB = "hub:"  # prefix of the name of an export on the Hugging Face hub
BEST = "checkpoint_best.pth"
EXPORTED = ("model.safetensors", "config.yaml", "vocab.txt")  # files of softmask export
WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")  # endings of files of weights
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"  # in the files of ALBEF's own code
OWN_FIELDS = ("model", "config", "vocabulary")  # entries of a file that are fields of a Checkpoint
GROWTH = 4  # times its size that a file's content may unfold to; tied weights count twice
REFERENCES = 200  # most of a configuration, those in what they repeat included
DOUBLED = 6  # most of them that share a text with another, as each may double what it repeats
_NAME = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        path: The local file.
        state: The model's tensors by key.
        config: Resolved configuration of the run that wrote the file, with its sections ``model``,
            ``datasets`` and ``run``, from the file or from ``config.yaml`` beside it; None if
            there is neither, as for ALBEF's own files.
        vocabulary: Tokens by id, from the file or from ``vocab.txt`` beside it; None if there is
            neither.
        training: Everything else in the file: ``optimizer``, ``epoch``, ``progress``, ...
    """

    path: Path
    state: StateDict
    config: dict[str, Any] | None = None
    vocabulary: list[str] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def sep_token(self) -> bool:
        """Whether its captions end with [SEP]: as recorded, else not in ALBEF's own files."""
        recorded = (self.config or {"model": {}})["model"].get("sep_token")
        if isinstance(recorded, bool):
            return recorded
        return not any(key.endswith(TOKEN_TYPES) for key in self.state)


def open_checkpoint(
    source: str | Path, trusted: bool = False, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Open a checkpoint of this plugin, LAVIS, ALBEF or any other PyTorch model.

    Args:
        source: A file, the folder of a run (its best checkpoint, or else the furthest) or of
            ``softmask export``, a URL (downloaded once), ``hub:OWNER/NAME`` for such an export on
            the Hugging Face hub, ``shipped:NAME`` for bundled weights, or ``package:NAME`` for
            those of an installed package.
        trusted: Load any pickled object, which can run any code, of any size; only for files that
            you trust.
        device: Where the tensors go.

    Raises:
        UserError: There is no such file, it is damaged, it holds objects that could run code, or
            it would take far more memory than its size.
    """
    path = _locate(str(source))
    if not path.is_file():
        raise UserError(f"no checkpoint at {source}: {_instead(Path(source).expanduser())}")
    content = _load(path, trusted, device)
    if not trusted:
        _require_bounded(content, path)
    if not isinstance(content, dict):
        content = {}
    state, training = content, {}
    if "model" in content:
        state = content["model"] if isinstance(content["model"], dict) else {}
        training = {key: value for key, value in content.items() if key not in OWN_FIELDS}
    return Checkpoint(
        path=path,
        state={k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)},
        config=_resolve(content.get("config"), path) or _config_beside(path),
        vocabulary=_vocabulary_within(content, path) or _vocabulary_beside(path),
        training=training,
    )


def furthest_first(folder: Path) -> list[Path]:
    """All checkpoints of a run's folder but the best, the furthest first."""
    found = []
    for path in folder.glob("checkpoint_*.pth"):
        if match := _NAME.fullmatch(path.name):
            epoch, step = int(match[1]), match[2]
            # The file of a whole epoch comes after those within it
            found.append(((epoch, int(step)) if step else (epoch + 1, -1), path))
    return [path for _, path in sorted(found, reverse=True)]


def require_sound(state: Mapping[str, Tensor], source: object) -> None:
    """Raise UserError at a tensor that would poison everything computed from it."""
    for name, tensor in state.items():
        special = tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized
        float8 = tensor.is_floating_point() and tensor.dtype.itemsize == 1  # isfinite lacks it
        if special or float8 or tensor.is_complex():
            raise UserError(f"{source}: '{name}' is no plain tensor of real numbers")
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: '{name}' holds NaN or infinite values: take an earlier checkpoint"
            )


def _locate(source: str) -> Path:
    if is_url(source):
        return fetch(source)
    if source.startswith(PACKAGED):
        return packaged_file(source, *WEIGHTS)
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB))
    if source.startswith(SHIPPED):
        name = source.removeprefix(SHIPPED)
        shipped = {file.stem: file for file in ASSETS.glob("*.safetensors")}
        if name not in shipped:
            raise UserError(f"no weights '{name}' are shipped: {suggest(name, shipped)}")
        return shipped[name]
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / BEST, *furthest_first(path), path / EXPORTED[0]]
        path = next((file for file in found if file.is_file()), found[0])
    return path


def _instead(path: Path) -> str:
    """What to give in the place of a path that has no checkpoint."""
    if not path.is_dir():
        return "give a file, a run's folder or a URL"
    runs = sorted(path.glob("*/checkpoint_*.pth"), key=lambda file: file.stat().st_mtime)
    if runs:
        return f"name one of the runs in it, such as the newest, {runs[-1].parent}"
    return "this folder is of no run that has saved one yet, nor of softmask export"


def _from_hub(name: str) -> Path:
    def load(name: str, **how: Any) -> list[str]:
        return [hf_hub_download(name, file, **how) for file in EXPORTED]

    try:
        return Path(from_hub(f"no model '{name}'", name, load)[0])
    except (OSError, ValueError) as error:
        raise UserError(
            f"the Hugging Face hub has no export of this plugin called '{name}': {reason_of(error)}"
        ) from error


def _load(path: Path, trusted: bool, device: torch.device | str) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\3\4"  # as torch tells; Python's is_zipfile reads the end
        if is_zip:  # torch does not compare checksums
            with zipfile.ZipFile(path) as archive:
                size = sum(each.file_size for each in archive.infolist())
                unfolds = size > path.stat().st_size or not _lists_for_torch(archive)
                if unfolds and not trusted:
                    raise _bomb(path)  # torch does not compress
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=not trusted)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}): it is cut short, damaged "
            "or of another kind, or holds objects that could run code (only for a file that you "
            "trust: model.trust_checkpoint=true)"
        ) from error


def _lists_for_torch(archive: zipfile.ZipFile) -> bool:
    """Whether torch's reader takes the same list of members as Python's. Each finds it by other
    fields at the end of the file, which could name two lists."""
    file: Any = archive.fp
    place = file.seek(-98, os.SEEK_END)
    large, locator, end = file.read(56), file.read(20), file.read(22)
    start = end[16:20]
    if locator[:4] == b"PK\6\7":
        start = large[48:56] if int.from_bytes(locator[8:16], "little") == place else b""
    found = int.from_bytes(start, "little")
    return end[:4] == b"PK\5\6" and found == archive.start_dir


def _require_bounded(content: Any, path: Path) -> None:
    """Raise UserError if whoever copied the content, with all that it repeats, would need far more
    memory than the file has bytes."""
    left, doubled, parts = GROWTH * path.stat().st_size, 0, [content]
    while parts:
        part = parts.pop()
        if isinstance(part, Tensor):
            left -= part.numel() * part.element_size()
        elif isinstance(part, (str, bytes, bytearray)):
            left -= len(part)
            doubled += max(0, str(part).count("${") - 1)
        elif isinstance(part, Mapping):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set)):
            parts += part
        left -= 1
        if left < len(parts) or doubled > DOUBLED:
            raise _bomb(path)


def _bomb(path: Path) -> UserError:
    return UserError(
        f"{path} was made to fill the memory, or is compressed: its {path.stat().st_size} bytes "
        "unfold to far more (only for a file that you trust: model.trust_checkpoint=true)"
    )


def _config_beside(path: Path) -> dict[str, Any] | None:
    file = path.parent / "config.yaml"
    if not file.is_file():
        return None
    with valid_yaml(file):
        content = OmegaConf.to_container(OmegaConf.load(file))
    _require_bounded(content, file)
    return _resolve(content, file)


def _vocabulary_within(content: Mapping[str, Any], path: Path) -> list[str] | None:
    tokens = content.get("vocabulary")
    if tokens is None or (isinstance(tokens, list) and all(isinstance(t, str) for t in tokens)):
        return tokens
    raise UserError(f"the vocabulary in {path} is not a list of tokens")


def _vocabulary_beside(path: Path) -> list[str] | None:
    file = path.parent / "vocab.txt"
    try:
        # Not splitlines, which takes some tokens for ends of lines
        return file.read_text("utf-8").rstrip("\n").split("\n") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no vocabulary: it is not UTF-8 text") from error


def _resolve(config: Any, path: Path) -> dict[str, Any] | None:
    """Resolve references between sections; None unless it is the configuration of a run."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return None
    try:
        whole = OmegaConf.create(config)
        _require_few_references(whole, path)
        resolved: Any = OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            f"the configuration in {path} cannot be resolved: {reason_of(error)}"
        ) from error
    except RecursionError as error:
        raise UserError(f"the configuration in {path} has too many levels") from error
    return resolved


def _require_few_references(config: Any, path: Path) -> None:
    left, parts = REFERENCES, [config]
    while parts:
        part = parts.pop()
        for key in list(part) if isinstance(part, DictConfig) else range(len(part)):
            left -= OmegaConf.is_interpolation(part, key)
            if left < 0:
                raise _bomb(path)
            if OmegaConf.is_config(part.get(key)):  # one reference is resolved, not those within
                parts.append(part[key])
