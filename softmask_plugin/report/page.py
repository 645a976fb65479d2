"""The report: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
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
    """Write the report of a run. Missing folders are created; an existing report is replaced.

    Args:
        path: The HTML file.
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

    Returns:
        The path.

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
    jinja.filters["percent"] = _percent
    jinja.filters["duration"] = lambda seconds: timedelta(seconds=round(seconds))
    page = jinja.get_template(TEMPLATE).render(
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
        raise UserError(f"the report {path} cannot be written ({error.strerror})") from error
    return path


def _table(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Heads (split, epoch), and by metric a text for each head."""
    numbers = [numbers_of(record) for record in splits.values()]
    return {
        "heads": [(split, record.get("epoch")) for split, record in splits.items()],
        "rows": {
            name: [f"{each[name]:.4g}" if name in each else "–" for each in numbers]
            for name in dict.fromkeys(name for each in numbers for name in each)
        },
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
    """A percentage with one decimal, or with one significant digit below 0.1.

    >>> _percent(81.25), _percent(0.02)
    ('81.2', '0.02')
    """
    return f"{value:.1f}" if value >= 0.1 or value == 0 else f"{value:.1g}"
