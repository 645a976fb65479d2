"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from softmask_plugin.errors import UserError
from softmask_plugin.report.figures import METRICS, loss_curves, validation_curves
from softmask_plugin.report.pairs import GALLERY, RERANKED, Miss
from softmask_plugin.runners.meter import numbers_of
from softmask_plugin.style import COLOURS, INK


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str = "",
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]] = (),
    runs: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
    options: Mapping[str, Sequence[object]] = MappingProxyType({}),
    panels: Sequence[Figure] = (),
    misses: Sequence[Miss] | None = None,
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
            ``"results"``: metrics by name, as LAVIS's tasks name them, for each column of the
            table. ``<metric>_chance`` is what guessing scores. The headlines show the last column.
            ``"images"``, ``"texts"``: the numbers of ranked images and texts.
            ``"pointing"``, ``"pointing_other"``, ``"named"``: see ``explain.scenes.pointing``.
        records: Lines of ``metrics.jsonl``.
        runs: Instead of ``records``: the lines of several runs, by name.
        options: Values of the options that differ between these runs.
        panels: Word panels; their labels become the pictures' alternative texts.
        misses: The worst retrievals; None: they are not known.
        pictures: Pictures of the masks during training, (caption, bytes of a PNG file).
        config: The whole configuration, shown as YAML.
        environment: Versions and devices by name.

    Raises:
        UserError: The file cannot be written.
    """
    results = {name: numbers_of(each) for name, each in metrics.get("results", {}).items()}
    logs = list(runs.values()) or [records]
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions, paths and options may contain anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"percent": _percent, "jpeg": _jpeg}
    jinja.filters["duration"] = lambda seconds: timedelta(seconds=round(seconds))
    page = jinja.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        metrics=metrics,
        results=results,
        names=_metric_names(results.values()),
        pointing=metrics.get("pointing", {}),
        other=metrics.get("pointing_other", {}),
        named=metrics.get("named", {}),
        train=[record for record in records if record.get("split") == "train"],
        runs=dict(zip(runs, COLOURS * len(runs), strict=False)),
        options=options,
        curves=[_svg(figure) for figure in loss_curves(*logs)],
        validation=[_svg(figure) for figure in validation_curves(*logs)],
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in pictures],
        panels=[_svg(panel) for panel in panels],
        misses=misses,
        gallery=GALLERY,
        reranked=RERANKED,
        config=OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        environment=environment,
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {path} cannot be written ({error.strerror})") from error
    return Path(path)


def _metric_names(columns: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """Titles of the table's rows by metric, in their order."""
    found = dict.fromkeys(key for each in columns for key in each if not key.endswith("_chance"))
    if {"r_mean", "acc", "pointing"} & found.keys():
        found.pop("agg_metrics", None)  # repeats them
    return {key: METRICS.get(key, key) for key in (*METRICS, *found) if key in found}


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
    value = round(value, 9)  # 6.25 and 6.250000000000002 are shown alike
    return f"{value:.1f}" if value >= 0.1 or value == 0 else f"{value:.1g}"


def _jpeg(image: Image.Image) -> str:
    """A small JPEG file in base64."""
    small, content = image.copy(), io.BytesIO()
    small.thumbnail((280, 280))
    small.save(content, "JPEG", quality=88)
    return base64.b64encode(content.getvalue()).decode()
