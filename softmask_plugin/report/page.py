"""The report: one HTML file that needs nothing else, to look at, mail or archive."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from softmask_plugin.errors import UserError
from softmask_plugin.report.figures import INK, loss_curves, numbers_of, validation_curves

TEMPLATE = "report.html.j2"


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
    """Write the report of a run. Folders are made, an earlier report is replaced.

    Args:
        path: the HTML file.
        title: its heading.
        summary: one paragraph of plain text under the heading.
        metrics: the results, each part optional.
            ``"retrieval"``: one dict of recalls (``txt_r1`` .. ``img_r10``, percent, as LAVIS's
            task returns) for each way of ranking, ``"itc"`` and ``"itm"`` for instance, in the
            table's order, together with ``"chance"`` from :func:`retrieval_chance`; headlines
            are taken from the last that is not chance.
            ``"images"``, ``"texts"``: how many were ranked.
            ``"pointing"``: what :func:`pointing_game` returns; ``"pointing_other"``: the same for
            the :func:`swapped` boxes.
            ``"splits"``: by split, the line of ``metrics.jsonl`` that holds its metrics.
        records: the lines of ``metrics.jsonl``.
        panels: word panels; their labels become the pictures' alternative texts.
        pictures: of the soft masks during training, (caption, PNG file's bytes).
        config: the merged configuration, shown as YAML in a folded section.
        environment: versions and devices by name, shown likewise.

    Returns:
        The path written.

    Raises:
        UserError: it cannot be written.
    """
    retrieval = dict(metrics.get("retrieval", {"chance": {}}))
    train = [record for record in records if record.get("split") == "train"]
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # always: captions, paths and options are not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["percent"] = _percent
    page = jinja.get_template(TEMPLATE).render(
        title=title,
        summary=summary,
        metrics=metrics,
        chance=retrieval.pop("chance"),
        retrieval=retrieval,
        pointing=metrics.get("pointing", {}),
        other=metrics.get("pointing_other", {}),
        training=_training(train) if train else None,
        curves=_svg(loss_curves(records)) if train else "",
        validation=_svg(validation) if (validation := validation_curves(records)).axes else "",
        splits=_table(metrics.get("splits", {})),
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in pictures],
        panels=[_svg(panel) for panel in panels],
        config=OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        environment=environment,
    )
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report {path} ({error.strerror})") from error
    return path


def _training(train: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "steps": train[-1]["step"],
        "time": timedelta(seconds=round(train[-1]["time"])),
        "speed": fmean(record["pairs_per_s"] for record in train),
        "skipped": train[-1].get("skipped_steps", 0),
    }


def _table(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Heads (split, epoch) and, by metric, a text for each of them."""
    numbers = {split: numbers_of(record) for split, record in splits.items()}
    names = dict.fromkeys(name for each in numbers.values() for name in each)
    return {
        "heads": [(split, record.get("epoch")) for split, record in splits.items()],
        "rows": {
            name: [f"{each[name]:.4g}" if name in each else "–" for each in numbers.values()]
            for name in names
        },
    }


def _svg(figure: Figure) -> Markup:
    """Return the figure as an inline ``<svg>`` in the page's own font and text colour."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):  # matplotlib escapes the text it writes
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    label = Markup.escape(figure.get_label())
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _percent(value: float) -> str:
    """Write a percentage with one digit behind the point, more where that would read 0.0.

    >>> _percent(81.25), _percent(0.02)
    ('81.2', '0.02')
    """
    return f"{value:.1f}" if value >= 0.1 or value == 0 else f"{value:.1g}"
