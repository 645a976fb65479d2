"""The shipped YAML files: where they are, their names, and loading those that inherit from another.

The command line needs this before torch and LAVIS are imported, and so without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmask_plugin.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the wheel, or beside the package in a checkout
CONFIGS = next(
    folder
    for folder in (PACKAGE / "lavis_configs", PACKAGE.parent / "lavis_configs")
    if folder.is_dir()
)


def shipped(relative: str) -> str:
    """Absolute path of a shipped YAML file; LAVIS prepends its own root to relative ones."""
    return str(CONFIGS / relative)


def load_inherited(path: str | Path) -> DictConfig:
    """Load a YAML file on top of the one beside it that its key ``inherits`` names, if any."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.load(path)
    parent = content.pop("inherits", None)
    if parent is not None:
        content = OmegaConf.merge(load_inherited(Path(path).parent / parent), content)
    return content


@cache
def whole_yaml(path: str) -> str:
    """Text of a YAML file that has the keys it inherits; a file is read once in a process."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(load_inherited(path))


def shipped_configs() -> dict[str, Path]:
    """Shipped project files by short name, such as ``scenes/train/pretrain_tiny``."""
    return {_short(file): file for file in sorted((CONFIGS / "projects").rglob("*.yaml"))}


def shipped_plans() -> dict[str, Path]:
    """Shipped plans of ablations by short name, such as ``ablation/small``."""
    return {_short(file): file for file in sorted((CONFIGS / "ablation").glob("*.yaml"))}


def find_file(option: str, name: str | Path, shipped: Mapping[str, Path]) -> Path:
    """Find the file that an option of the command line names.

    Args:
        option: The option, for the message.
        name: A path, the name of a shipped file (``scenes/train/vqa_tiny``, also with
            ``lavis_configs/projects/`` and ``.yaml``), or an end of it that fits only one.
        shipped: Shipped files by short name.

    Raises:
        UserError: There is no such file; the nearest names are given.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    short = _short(path)
    ending = [key for key in shipped if f"/{key}".endswith(f"/{short}")]
    if short in shipped or len(ending) == 1:
        return shipped[short if short in shipped else ending[0]]
    near = (
        [file.as_posix() for file in path.glob("*.y*ml")]  # of a folder, such as a run's
        or [key for key in shipped if f"/{short}/" in f"/{key}/"]
        or _nearest(path.as_posix(), [file.as_posix() for file in path.parent.glob("*.y*ml")])
        or _nearest(short, shipped)
    )
    hint = did_you_mean(near) if near else "'softmask configs' lists those that are shipped"
    raise UserError(f"{option}: there is no file '{name}': {hint}")


def _short(path: Path) -> str:
    name = path.with_suffix("") if path.suffix == ".yaml" else path
    if name.is_relative_to(CONFIGS):
        name = name.relative_to(CONFIGS)
    return name.as_posix().removeprefix("lavis_configs/").removeprefix("projects/")


def _nearest(name: str, keys: Iterable[str]) -> list[str]:
    """At most three keys whose last parts are like the name's; the nearest first."""

    def likeness(key: str) -> tuple[float, float]:
        own, other = (each.rpartition("/")[2] for each in (name, key))
        return SequenceMatcher(None, own, other).ratio(), SequenceMatcher(None, name, key).ratio()

    near = (key for key in keys if likeness(key)[0] > 0.7)
    return sorted(near, key=likeness, reverse=True)[:3]
