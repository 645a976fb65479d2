"""Every patch to the host stack, each with its reason and the versions that need it.

Imported before all that imports LAVIS, so that ``import lavis`` works afterwards.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from softmask_plugin.errors import UserError, reason_of, suggest

# Warnings by category, module and start of the message
QUIET: tuple[tuple[type[Warning], str, str], ...] = (
    (FutureWarning, r"(fairscale|lavis)\.", ""),  # torch.cuda.amp (torch >= 2.4)
    (DeprecationWarning, "", "`torch.jit.script` is deprecated"),  # fairscale (torch >= 2.10)
    (FutureWarning, "", "Importing from timm"),  # LAVIS (timm >= 0.9)
    (FutureWarning, "", "`resume_download` is deprecated"),  # transformers < 4.43
    (UserWarning, "", "'pin_memory' argument is set as true"),  # LAVIS's data loaders on a CPU
    (UserWarning, "", "Glyph .* missing from"),  # matplotlib, for each character without a font
)

# torch drops a library's definitions when the library is garbage-collected.
_LIBRARIES: list[Any] = []


def patch() -> None:
    """Apply every patch that is needed. Repeating this is harmless."""
    _define_torchvision_schemas()
    _restore_numpy_inf()
    _quiet_dependencies()
    _import_lavis()
    _name_unknown_models()
    _check_lavis_own_configs()
    _run_the_named_runner()
    _let_one_process_pass()
    _find_duplicates_fast()
    _say_what_cannot_be_downloaded()


def _define_torchvision_schemas() -> None:
    """Let torchvision from PyPI import beside a CPU build of torch (seen with 0.28 and 2.13+cpu).

    Its compiled part does not load, so registering a fake kernel fails: "operator torchvision::nms
    does not exist". With the two schemas defined, transforms, models and datasets work; ``nms``
    itself stays unavailable.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        import torchvision  # noqa: F401


def _restore_numpy_inf() -> None:
    """numpy 2 dropped ``np.Inf``, which ALBEF and BLIP use in every LAVIS release."""
    if not hasattr(np, "Inf"):
        vars(np)["Inf"] = np.inf


def _quiet_dependencies() -> None:
    """Mute what dependencies say about themselves, which no user can do anything about."""
    for category, module, message in QUIET:
        warnings.filterwarnings("ignore", message, category, module)
    # Streamlit, when the app's module is imported before its server runs
    streamlit = logging.getLogger("streamlit.runtime.caching.cache_data_api")
    streamlit.addFilter(lambda record: "No runtime found" not in record.getMessage())


def _import_lavis() -> None:
    try:
        import lavis.models  # noqa: F401
    except Exception as error:  # of any of the packages that it imports
        raise UserError(
            f"import lavis fails ({type(error).__name__}: {error}): install what it misses "
            "(requirements/modern.txt lists all that it needs)"
        ) from error


def _name_unknown_models() -> None:
    """Let ``load_model`` say that it does not know a model: LAVIS (all releases) fails at None."""
    from lavis import models

    class NamingRegistry(type(models.registry)):  # type: ignore[misc]
        """LAVIS's registry, with an error in place of None."""

        @classmethod
        def get_model_class(cls, name: str) -> Any:
            found = super().get_model_class(name)
            if found is None:
                raise UserError(f"unknown model '{name}': {suggest(name, cls.list_models())}")
            return found

    models.registry = NamingRegistry()


def _check_lavis_own_configs() -> None:
    """Let LAVIS's own scripts (all releases) read overrides and check a file as our commands do.

    LAVIS merges ``--options`` too late for ``model.arch`` and ``model.model_type`` to choose the
    defaults, and so the weights, and it evaluates random ones without a word. Its runners never
    work on a CPU: they lose a model that is already on its device, and their loaders use CUDA.
    """
    from lavis.common.config import Config
    from lavis.common.registry import registry

    from softmask_plugin.config.values import check_weights, require_weights

    build, init = Config.build_model_config, Config.__init__

    def build_model_config(config: Any, **options: Any) -> Any:
        config = OmegaConf.merge(config, options) if options else config
        merged, run = build(config), config.run
        runner = registry.get_runner_class(name := run.get("runner", "runner_base"))
        if run.get("device") == "cpu" and runner and runner.__module__.startswith("lavis."):
            hint = "set run.runner=softmask_runner"
            raise UserError(f"run.runner is '{name}', which works with CUDA only: {hint}")
        check_weights(config.model, merged.model)
        if run.get("evaluate"):
            require_weights(merged.model)
        return merged

    def __init__(self: Any, args: Any) -> None:
        try:
            init(self, args)
        except Exception:
            registry.unregister("configuration")  # this half of one
            raise

    Config.__init__ = __init__
    Config.build_model_config = staticmethod(build_model_config)


def _run_the_named_runner() -> None:
    """Let LAVIS's evaluate.py (all releases) use ``run.runner``: it always takes RunnerBase."""
    from lavis.common.registry import registry
    from lavis.runners.runner_base import RunnerBase

    from softmask_plugin.config.values import require_weights

    def new(cls: type, cfg: Any, *_: Any, **__: Any) -> Any:
        named = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_base"))
        if cls is not RunnerBase or named in (None, cls):
            return object.__new__(cls)
        require_weights(cfg.model_cfg)  # the file may be one for training
        return object.__new__(named)

    RunnerBase.__new__ = new


def _let_one_process_pass() -> None:
    """LAVIS's runners (all releases) wait for others after each epoch, even if there are none."""
    from lavis.runners import runner_base, runner_iter

    def barrier() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    for module in (runner_base, runner_iter):
        vars(module)["dist"] = SimpleNamespace(barrier=barrier)  # all that they use of it


def _say_what_cannot_be_downloaded() -> None:
    """LAVIS's data sets (all releases) fail at an annotation file that cannot be had without its
    name; SNLI-VE's are at paths inside Salesforce."""
    from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder

    download = BaseDatasetBuilder._download_ann

    def download_ann(self: Any) -> None:
        try:
            download(self)
        except (OSError, ValueError) as error:
            annotations = self.config.build_info.annotations
            files = ", ".join(str(each.storage) for each in annotations.values())
            raise UserError(
                f"{type(self).__name__} cannot download its annotations ({reason_of(error)}): put "
                f"{files} below env.cache_root of LAVIS's configs/default.yaml"
            ) from error

    BaseDatasetBuilder._download_ann = download_ann


def _find_duplicates_fast() -> None:
    """LAVIS's tasks (all releases) seek each result in a list: most of an hour for VQA's test."""
    from lavis.tasks import base_task

    save = base_task.BaseTask.save_result

    def save_result(
        result: list[Any], result_dir: str, filename: str, remove_duplicate: str = ""
    ) -> str:
        file = Path(save(result, result_dir, filename))
        if remove_duplicate and base_task.is_main_process():
            firsts: dict[Any, Any] = {}
            for row in json.loads(file.read_text(encoding="utf-8")):
                firsts.setdefault(row[remove_duplicate], row)
            file.write_text(json.dumps([*firsts.values()]), encoding="utf-8")
        return str(file)

    base_task.BaseTask.save_result = staticmethod(save_result)
