"""The report of a run, or of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from softmask_plugin.config.check import valid_yaml
from softmask_plugin.config.options import ModelOptions, SoftMaskOptions
from softmask_plugin.config.values import flat
from softmask_plugin.datasets.task_datasets import PretrainDataset, RetrievalDataset
from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.explain.trained import load_trained
from softmask_plugin.files.checkpoint import SHIPPED
from softmask_plugin.host.environment import noted_environments
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.report.page import write_report
from softmask_plugin.report.pairs import build_datasets, draw_pairs, worst_retrievals
from softmask_plugin.report.records import best_epoch, chance_of, read_metrics
from softmask_plugin.runners.meter import numbers_of

PICTURES = 8  # most pictures of the masks: the first, the last, and some in between


def report_run(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, of any task, whether it is running, killed or finished.

    If the run has a checkpoint and its images are found, the page also shows the worst retrievals
    and, unless pictures were kept in training, where words look.

    Returns:
        The HTML file: ``path``, or ``report.html`` in the folder.

    Raises:
        UserError: The folder is not that of a run, a file in it is broken, or the report cannot be
            written.
    """
    run = _Run(Path(run_dir))
    pictures = _pictures(run.folder / "masks")
    pairs = run.pairs(panels=not pictures)
    return write_report(
        run.folder / "report.html" if path is None else path,
        title=run.title,
        summary=run.summary(bool(pictures or pairs.get("panels"))),
        metrics={"results": run.results()},
        records=run.records,
        pictures=pictures,
        config=run.config,
        environment=_environment(run.folder),
        **pairs,
    )


def report_runs(run_dirs: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write a report of several runs side by side: metrics, curves, and options that differ.

    Returns:
        The HTML file: ``path``, or ``report.html`` in the current folder.

    Raises:
        UserError: As for :func:`report_run`.
    """
    runs = {chr(ord("A") + i): _Run(Path(folder)) for i, folder in enumerate(run_dirs)}
    options = {name: flat(run.config) for name, run in runs.items()}
    keys = sorted(set().union(*options.values()))
    values = {key: [each.get(key, "–") for each in options.values()] for key in keys}
    differing = {key: row for key, row in values.items() if any(v != row[0] for v in row)}
    return write_report(
        "report.html" if path is None else path,
        title=f"{len(runs)} runs",
        metrics={
            "results": {
                f"{name}: {split}": metrics
                for name, run in runs.items()
                for split, metrics in run.results().items()
            }
        },
        runs={name: run.records for name, run in runs.items()},
        options={
            "folder": [run.folder for run in runs.values()],
            "so far": [run.summary(pictures=True) for run in runs.values()],
            **differing,
        },
        config={name: run.config for name, run in runs.items()},
        environment={name: str(run.folder) for name, run in runs.items()},
    )


class _Run:
    """What a run's folder holds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, ""
        file = folder / "config.yaml"
        with valid_yaml(file):
            loaded = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
            config: Any = OmegaConf.to_container(loaded, resolve=True)
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        begun = (folder / "metrics.jsonl").exists() or not self.config
        self.records = read_metrics(folder) if begun else []
        self.model, self.run = (self.config.get(key) or {} for key in ("model", "run"))
        self.title = f"{self.model.get('arch', 'Run')} {folder.resolve().name}"
        self.datasets: dict[str, Any] = {}
        try:
            self.datasets = build_datasets(self.config)
        except (UserError, OmegaConfBaseException) as error:
            self.notes = f" Without chance and pairs: {reason_of(error)}."

    def results(self) -> dict[str, dict[str, Any]]:
        """Metrics of the best epoch, or else of the latest one, with chance, by split and epoch."""
        evaluated = [record for record in self.records if record.get("split") != "train"]
        chosen = {record["split"]: record for record in evaluated}
        valid = (self.run.get("valid_splits") or [None])[0]
        if (best := best_epoch(evaluated, valid)) is not None:
            chosen |= {r["split"]: r for r in evaluated if r.get("epoch") == best}
        return {
            split if record.get("epoch") is None else f"{split}, epoch {record['epoch']}": {
                **numbers_of(record),
                **{f"{k}_chance": v for k, v in chance_of(self.datasets.get(split)).items()},
            }
            for split, record in chosen.items()
        }

    def pairs(self, panels: bool) -> dict[str, Any]:
        """The run's images, as the best checkpoint sees them: word panels, and retrievals."""
        dataset, arch = next(iter(self.datasets.values()), None), self.model.get("arch")
        aligned = issubclass(registry.get_model_class(arch) or object, AlignedBase)
        if not aligned or not isinstance(dataset, (PretrainDataset, RetrievalDataset)):
            return {}
        found: dict[str, Any] = {}
        try:
            named = "finetuned" if self.model.get("load_finetuned") else "pretrained"
            evaluated = str(self.model.get(named)) if self.run.get("evaluate") else ""
            local = Path(evaluated).exists() or evaluated.startswith(SHIPPED)  # ask no network
            trained = load_trained(evaluated if evaluated and local else self.folder).on_gpu()
            if panels:
                found["panels"] = draw_pairs(trained, dataset)
            if isinstance(dataset, RetrievalDataset):
                found["misses"] = worst_retrievals(trained, dataset, self.run)
        except UserError as error:
            self.notes = f" Without pairs: {error}."
        except torch.OutOfMemoryError:
            self.notes = " Without pairs: the GPU has too little memory left."
        return found

    def summary(self, pictures: bool) -> str:
        """How far the run is, and how to get pictures of its masks."""
        train = [record for record in self.records if record.get("split") == "train"]
        if not train:
            done = "Nothing was trained." if self.records else "Nothing is logged yet."
            return done + self.notes
        text = f"Logged up to step {train[-1]['step']}, in epoch {train[-1]['epoch']}"
        last = self.run.get("max_epoch")
        text += f" (0 to {last - 1})." if last else "."
        schema = getattr(registry.get_model_class(self.model.get("arch")), "OPTIONS", ModelOptions)
        default = getattr(schema(), "soft_mask", SoftMaskOptions(enabled=False))
        enabled = (self.model.get("soft_mask") or {}).get("enabled", default.enabled)
        if enabled and not pictures and self.run.get("panel_every") is None:
            text += " There are no pictures of the masks: set run.panel_every."
        return text + self.notes


def _pictures(folder: Path) -> list[tuple[str, bytes]]:
    """Some of the pictures in order: (caption, PNG)."""
    names = (file.stem.removeprefix("step_") for file in folder.glob("step_*.png"))
    steps = sorted(int(name) for name in names if name.isdecimal())
    chosen = np.linspace(0, len(steps) - 1, min(PICTURES, len(steps))).round().astype(int)
    shown = [steps[i] for i in chosen]
    return [(f"After step {n}", (folder / f"step_{n}.png").read_bytes()) for n in shown]


def _environment(folder: Path) -> dict[str, object]:
    """Versions and devices by name, as "a, then b" if the run was resumed on another one."""
    starts = noted_environments(folder) or [{"unknown": "the run noted none"}]
    kinds = dict.fromkeys(name for start in starts for name in start)
    return {
        kind: ", then ".join(value for value, _ in groupby(str(each.get(kind)) for each in starts))
        for kind in kinds
    }
