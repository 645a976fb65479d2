"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from lavis.common.registry import registry
from markupsafe import Markup
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from softmask_plugin.config.check import valid_yaml
from softmask_plugin.config.options import ModelOptions, SoftMaskOptions
from softmask_plugin.errors import UserError
from softmask_plugin.host.environment import noted_environments
from softmask_plugin.report.figures import INK, loss_curves, numbers_of, validation_curves
from softmask_plugin.report.records import read_metrics

PICTURES = 8  # most pictures of the masks: the first, the last, and some in between


def report_run(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, of any task, whether it is running, killed or finished.

    Returns:
        The HTML file: ``path``, or ``report.html`` in the folder.

    Raises:
        UserError: The folder is not that of a run, a file in it is broken, or the report cannot be
            written.
    """
    folder = Path(run_dir)
    file = folder / "config.yaml"
    with valid_yaml(file):
        loaded = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
        config: Any = OmegaConf.to_container(loaded, resolve=True)
    config = config if isinstance(config, dict) else {}
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


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str = "",
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    panels: Sequence[Figure] = (),
    pictures: Sequence[tuple[str, bytes]] = (),
    config: Mapping[str, Any],
    environment: Mapping[str, object],
) -> Path:
    """Write a report as HTML. Missing folders are created; an existing report is replaced.

    Args:
        path: The HTML file, which is also returned.
        title: Its heading.
        summary: A paragraph of plain text under the heading.
        metrics: The results, each of them optional.
            ``"retrieval"``: recalls (``txt_r1`` .. ``img_r10``, percent, as from LAVIS's task) by
            kind of ranking, such as ``"itc"`` and ``"itm"``, in the table's order, and
            ``"chance"`` from :func:`retrieval_chance`. The headlines show the last that is not
            chance. ``"images"``, ``"texts"``: the numbers of ranked images and texts.
            ``"pointing"``: result of :func:`pointing_game`; ``"pointing_other"``: the same for
            :func:`swapped` boxes.
            ``"splits"``: for each split, its line of ``metrics.jsonl``.
        records: Lines of ``metrics.jsonl``.
        panels: Word panels; their labels become the pictures' alternative texts.
        pictures: Pictures of the masks during training, (caption, bytes of a PNG file).
        config: The whole configuration, shown as YAML.
        environment: Versions and devices by name.

    Raises:
        UserError: The file cannot be written.
    """
    retrieval = dict(metrics.get("retrieval", {"chance": {}}))
    train = [record for record in records if record.get("split") == "train"]
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions, paths and options may contain anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"percent": _percent, "numbers": numbers_of}
    jinja.filters["duration"] = lambda seconds: timedelta(seconds=round(seconds))
    page = jinja.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        metrics=metrics,
        chance=retrieval.pop("chance"),
        retrieval=retrieval,
        pointing=metrics.get("pointing", {}),
        other=metrics.get("pointing_other", {}),
        train=train,
        curves=_svg(loss_curves(records)) if train else "",
        validation=_svg(validation) if (validation := validation_curves(records)).axes else "",
        splits=metrics.get("splits", {}),
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in pictures],
        panels=[_svg(panel) for panel in panels],
        config=OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        environment=environment,
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {path} cannot be written ({error.strerror})") from error
    return Path(path)


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


def _svg(figure: Figure) -> Markup:
    """The figure as an inline ``<svg>`` in the page's font and text colour."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):  # matplotlib escapes texts itself
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    label = Markup.escape(figure.get_label())
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _percent(value: float) -> str:
    """One decimal, or one significant digit below 0.1: 81.2, 0.02."""
    return f"{value:.1f}" if value >= 0.1 or value == 0 else f"{value:.1g}"
