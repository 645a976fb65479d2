"""``softmask report RUN_DIR``: the folder of any run as one page, even while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin.config.check import valid_yaml
from softmask_plugin.config.options import ModelOptions, SoftMaskOptions
from softmask_plugin.host.environment import noted_environments
from softmask_plugin.report.page import write_report
from softmask_plugin.report.records import read_metrics

PICTURES = 8  # of the masks, at most: the first, the last, and some between


def report_run(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run from what its folder holds.

    Args:
        run_dir: the folder, of a run under way, killed or finished, of any task.
        path: the HTML file; None: ``report.html`` in the folder.

    Returns:
        The path written.

    Raises:
        UserError: it is no run's folder, a file in it is broken, or the report cannot be written.
    """
    folder = Path(run_dir)
    config = _config(folder)
    begun = (folder / "metrics.jsonl").exists() or not config
    records = read_metrics(folder) if begun else []
    pictures = _pictures(folder / "masks")
    return write_report(
        folder / "report.html" if path is None else path,
        title=f"{config.get('model', {}).get('arch', 'Run')} {folder.resolve().name}",
        summary=_summary(config, records, bool(pictures)),
        metrics={"splits": _last_of_each_split(records)},
        records=records,
        pictures=pictures,
        config=config,
        environment=_environment(folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    """The run's, {} where none was kept."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    with valid_yaml(path):
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    return config if isinstance(config, dict) else {}


def _environment(folder: Path) -> dict[str, object]:
    """By name what the run was on, in turn where it went on on something else."""
    starts = noted_environments(folder) or [{"unknown": "the run noted none"}]
    kinds = dict.fromkeys(name for start in starts for name in start)
    return {
        kind: ", then ".join(value for value, _ in groupby(str(each.get(kind)) for each in starts))
        for kind in kinds
    }


def _summary(
    config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], pictures: bool
) -> str:
    """How far the run is, and how to get pictures where it could make some but does not."""
    run = config.get("run", {})
    train = [record for record in records if record.get("split") == "train"]
    if not train:
        return "Nothing was trained." if records else "Nothing is logged yet."
    last = train[-1]
    done = f"The last line logged is of step {last['step']}, in epoch {last['epoch'] + 1}"
    done += f" of {run['max_epoch']}." if "max_epoch" in run else "."
    if not pictures and run.get("panel_every") is None and _masks(config.get("model", {})):
        done += " There are no pictures of the masks: set run.panel_every."
    return done


def _masks(model: Mapping[str, Any]) -> bool:
    """Whether a ``model:`` section has a soft mask, by itself or by its model's defaults."""
    options = getattr(registry.get_model_class(model.get("arch")), "OPTIONS", ModelOptions)
    default = getattr(options(), "soft_mask", SoftMaskOptions(enabled=False))
    return bool((model.get("soft_mask") or {}).get("enabled", default.enabled))


def _last_of_each_split(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {record["split"]: record for record in records if record.get("split") != "train"}


def _pictures(folder: Path) -> list[tuple[str, bytes]]:
    """Some of the pictures in the order of their steps: (caption, PNG)."""
    steps = sorted(
        int(number)
        for file in folder.glob("step_*.png")
        if (number := file.stem.removeprefix("step_")).isdecimal()
    )
    count = min(PICTURES, len(steps))
    shown = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    return [(f"After step {step}", (folder / f"step_{step}.png").read_bytes()) for step in shown]
