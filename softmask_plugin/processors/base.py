"""What all processors share: they are built from YAML, and an unknown key is an error."""

from __future__ import annotations

import inspect
from typing import Any

from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf

from softmask_plugin.errors import UserError, require_known


class Processor(BaseProcessor):
    """A LAVIS processor whose YAML keys are its constructor's arguments."""

    NAME = ""

    @classmethod
    def from_config(cls, cfg: Any = None) -> Processor:
        """Build from a YAML section, an OmegaConf or plain mapping (None: all defaults).

        Raises:
            UserError: An unknown key, or a value out of range.
        """
        if OmegaConf.is_config(cfg):
            cfg = OmegaConf.to_container(cfg, resolve=True)
        options = {key: value for key, value in (cfg or {}).items() if key != "name"}
        require_known(cls.NAME, options, inspect.signature(cls).parameters)
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:  # a value of the wrong kind
            raise UserError(f"{cls.NAME}: {error}") from error

    @classmethod
    def require(cls, condition: bool, message: str) -> None:
        """Raise UserError, which names the processor, unless the condition holds."""
        if not condition:
            raise UserError(f"{cls.NAME}: {message}")
