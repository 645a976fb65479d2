"""The shipped YAML files: where they are, and loading those that inherit from another one."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

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
    content = OmegaConf.load(path)
    assert isinstance(content, DictConfig)
    parent = content.pop("inherits", None)
    if parent is None:
        return content
    merged = OmegaConf.merge(load_inherited(Path(path).parent / parent), content)
    assert isinstance(merged, DictConfig)
    return merged
