"""``softmask report RUN_DIR``: any run's folder as one page, even while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin.config.check import valid_yaml
from softmask_plugin.config.options import ModelOptions, SoftMaskOptions
from softmask_plugin.host.environment import noted_environments
from softmask_plugin.report.page import write_report
from softmask_plugin.report.records import read_metrics

PICTURES = 8  # most pictures of the masks: the first, the last, and some in between


def report_run(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, of any task, whether it is running, killed or finished.

    Args:
        run_dir: The run's folder.
        path: The HTML file; None: ``report.html`` in the folder.

    Returns:
        The path of the report.

    Raises:
        UserError: The folder is not that of a run, a file in it is broken, or the report cannot be
            written.
    """
    folder = Path(run_dir)
    file = folder / "config.yaml"
    with valid_yaml(file):
        config: Any = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
        config = OmegaConf.to_container(config, resolve=True)
    begun = (folder / "metrics.jsonl").exists() or not config
    records = read_metrics(folder) if begun else []
    pictures = _pictures(folder / "masks")
    return write_report(
        folder / "report.html" if path is None else path,
        title=f"{config.get('model', {}).get('arch', 'Run')} {folder.resolve().name}",
        summary=_summary(config, records, bool(pictures)),
        metrics={"splits": {r["split"]: r for r in records if r.get("split") != "train"}},
        records=records,
        pictures=pictures,
        config=config,
        environment=_environment(folder),
    )


def _summary(
    config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], pictures: bool
) -> str:
    """How far the run is, and how to get pictures of its masks."""
    run, model = config.get("run", {}), config.get("model", {})
    train = [record for record in records if record.get("split") == "train"]
    if not train:
        return "Nothing was trained." if records else "Nothing is logged yet."
    text = f"Logged up to step {train[-1]['step']}, in epoch {train[-1]['epoch'] + 1}"
    text += f" of {run['max_epoch']}." if "max_epoch" in run else "."
    schema = getattr(registry.get_model_class(model.get("arch")), "OPTIONS", ModelOptions)
    default = getattr(schema(), "soft_mask", SoftMaskOptions(enabled=False))
    enabled = (model.get("soft_mask") or {}).get("enabled", default.enabled)
    if enabled and not pictures and run.get("panel_every") is None:
        text += " There are no pictures of the masks: set run.panel_every."
    return text


def _pictures(folder: Path) -> list[tuple[str, bytes]]:
    """Some of the pictures in order: (caption, PNG)."""
    names = (file.stem.removeprefix("step_") for file in folder.glob("step_*.png"))
    steps = sorted(int(name) for name in names if name.isdecimal())
    chosen = np.linspace(0, len(steps) - 1, min(PICTURES, len(steps))).round().astype(int)
    return [
        (f"After step {step}", (folder / f"step_{step}.png").read_bytes())
        for step in (steps[i] for i in chosen)
    ]


def _environment(folder: Path) -> dict[str, object]:
    """Versions and devices by name, as "a, then b" if the run was resumed on another one."""
    starts = noted_environments(folder) or [{"unknown": "the run noted none"}]
    kinds = dict.fromkeys(name for start in starts for name in start)
    return {
        kind: ", then ".join(value for value, _ in groupby(str(each.get(kind)) for each in starts))
        for kind in kinds
    }
