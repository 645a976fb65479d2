"""Does a mask give the match away? ``python -m benchmarks.giveaway outputs/ablation/scenes``

A mask says nothing about whether a caption is right. A model that scores wrong captions higher once
something is masked has learnt that the mask itself means a match: without ``soft_mask.negatives``,
training only ever masks matching pairs. This scores models that `softmask ablate` pretrained, on
held-out scenes, each with its caption and with the same caption but for a wrong colour: without a
mask, with each word's soft mask, and with as much masked at random patches. Every checkpoint gets
both kinds of mask, whatever it was trained with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import matplotlib as mpl
from matplotlib.figure import Figure
from tqdm import tqdm

from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import Plan, read_plan
from softmask_plugin.ablate.table import range_table
from softmask_plugin.datasets.scenes.grammar import Scene, captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError, reason_of, require_finite_scores
from softmask_plugin.explain.gallery import wrong_caption
from softmask_plugin.explain.maps import word_maps
from softmask_plugin.explain.pairs import match_masked
from softmask_plugin.explain.trained import Trained, load_trained
from softmask_plugin.files.checkpoint import ASSETS
from softmask_plugin.files.whole import write_json, write_whole
from softmask_plugin.report.figures import ACCENT, INK, MUTED, STYLE
from softmask_plugin.soft_mask import Kind

PLAN = "lavis_configs/ablation/scenes.yaml"
CAPTIONS = {"right": (INK, -0.16), "wrong": (ACCENT, 0.16)}  # colour, and offset within a row
MASKS: dict[Kind, str] = {"soft": "soft_mask", "random": "random_patches"}
COLUMNS = (
    "right right_soft_mask right_random_patches wrong wrong_soft_mask wrong_random_patches"
).split()

Matches = dict[str, float]  # mean probability of a match, in percent, for each of COLUMNS
Sources = dict[str, tuple[Sequence[str], Mapping[int, Path | None]]]  # options and checkpoints


@dataclass(frozen=True)
class Variant:
    """A variant's options, and its scores by seed."""

    options: Sequence[str]
    seeds: Mapping[int, Matches]


def measure(trained: Trained, count: int) -> Matches:
    """Score ``count`` held-out scenes with a right and a wrong caption each.

    Raises:
        UserError: There are not that many scenes, or a score is NaN or infinite.
    """
    scenes = tqdm(make_scenes("test", count), leave=False, disable=None)
    return _means([_scores(trained, scene) for scene in scenes])


def _scores(trained: Trained, scene: Scene) -> Matches:
    """Scores of one scene: plain, and under masks the mean over the words."""
    model, found = trained.model, {}
    image = trained.image_processor(render(scene, model.options.image_size))[None]
    texts = (captions(scene)[0].text, wrong_caption(scene))
    for caption, text in zip(CAPTIONS, texts, strict=True):
        words = word_maps(model, image, [trained.text_processor(text)])
        found[caption] = words.score
        for kind, mask in MASKS.items():
            _, scores = match_masked(model, words, kind)
            found[f"{caption}_{mask}"] = scores.mean()
        require_finite_scores("a heat map or a match", words.maps, *found.values())
    return {column: 100 * score.item() for column, score in found.items()}


def _means(found: Collection[Matches]) -> Matches:
    return {column: statistics.fmean(each[column] for each in found) for column in COLUMNS}


def ablated(plan: Plan, folder: Path, only: Sequence[str]) -> Sources:
    """The finished pretrainings of an ablation: all of them, or those of ``only`` in its order.

    Raises:
        UserError: There is no such folder or variant, a variant of ``only`` is not finished or none
            is, or a result is broken or was made with another configuration.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the --output-dir of softmask ablate")
    plan.require_variants("--only", only)
    found = {name: _finished(plan, name, folder) for name in only or plan.variants}
    missing = [name for name in only if not found[name]]
    if missing or not any(found.values()):
        what = ", ".join(missing) or f"the plan '{plan.name}'"
        raise UserError(f"no pretraining of {what} is finished in {folder}: run softmask ablate")
    return {name: (plan.variants[name], seeds) for name, seeds in found.items() if seeds}


def _finished(plan: Plan, variant: str, folder: Path) -> dict[int, Path | None]:
    """The last checkpoint of each seed whose pretraining is finished."""
    jobs = (Job(plan, variant, seed, folder) for seed in plan.seeds)
    found = {job.seed: job.checkpoint(plan.base) for job in jobs}
    return {seed: file for seed, file in found.items() if file}


def shipped() -> Sources:
    """The bundled model."""
    about = json.loads((ASSETS / "scenes_tiny.json").read_text(encoding="utf-8"))
    options = about["command"].partition(" --options ")[2].split()
    return {"scenes_tiny": (options, {about["seed"]: None})}


def markdown(table: Mapping[str, Variant]) -> str:
    """A line for each variant: mean over its seeds, and their range."""
    titles = {column: column.replace("_", ", ", 1).replace("_", " ") for column in COLUMNS}
    rows = {
        name: {
            title: {seed: each[column] for seed, each in variant.seeds.items()}
            for column, title in titles.items()
        }
        for name, variant in table.items()
    }
    return range_table(rows, digits=1)


def draw(table: Mapping[str, Variant]) -> Figure:
    """A panel for each kind of mask: a line from the plain match (dot) to the masked one (ring), as
    means over seeds."""
    means = [_means(variant.seeds.values()) for variant in table.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 1.1 + 0.36 * len(table)), layout="constrained")
        panels = figure.subplots(1, len(MASKS), sharex=True, sharey=True)
        for axes, mask in zip(panels, MASKS.values(), strict=True):
            axes.set_title(f"under {mask.replace('_', ' ')}")
            axes.grid(color=MUTED, alpha=0.2, linewidth=0.6)
            axes.tick_params(length=0)
            for caption, (colour, offset) in CAPTIONS.items():
                places = [row + offset for row in range(len(table))]
                plain = [each[caption] for each in means]
                masked = [each[f"{caption}_{mask}"] for each in means]
                axes.hlines(places, plain, masked, color=colour, label=f"{caption} caption")
                axes.plot(masked, places, "o", color=colour, mfc="white", markersize=7)
                axes.plot(plain, places, "o", color=colour, markersize=3.5)
        panels[0].set_yticks(range(len(table)), list(table))
        panels[0].set(xlim=(-3, 103), ylim=(len(table) - 0.5, -0.5))  # in the table's order
        known = panels[0].get_legend_handles_labels()
        figure.legend(*known, loc="outside upper center", ncols=len(CAPTIONS), frameon=False)
        label = "match in percent: plain (dot) and masked (ring)"
        figure.supxlabel(label, fontsize=9, color=MUTED)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; write it as JSON with each seed, and as a picture, if asked to.

    Returns:
        The exit code: 0, or 2 for a mistake, which is printed in one line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.giveaway",
        description="Does a mask give the match away? Held-out scenes with a right and a wrong "
        "caption, scored plain, with each word's soft mask and with random patches hidden.",
    )
    what = "--output-dir of an ablation on scenes, default: score the bundled model"
    parser.add_argument("folder", nargs="?", type=Path, help=what)
    parser.add_argument("--plan", help=f"plan of the ablation, default: {PLAN}")
    what = "variants to score, in this order; default: all whose pretraining is finished"
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help=what)
    parser.add_argument("--scenes", type=int, default=200, help="number, default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder for giveaway.json and .png")
    try:
        _run(parser.parse_args(argv))
    except UserError as error:
        print(f"giveaway: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(asked: argparse.Namespace) -> None:
    if asked.scenes < 1:
        raise UserError(f"--scenes is {asked.scenes}: it must be at least 1")
    if asked.folder is not None:
        sources = ablated(read_plan(asked.plan or PLAN), asked.folder, asked.only)
    elif asked.plan or asked.only:
        raise UserError("--plan and --only need an ablation: give its folder too")
    else:
        sources = shipped()
    if asked.output is not None:
        try:
            asked.output.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=asked.output):  # fail now: scoring takes minutes
                pass
        except OSError as error:
            raise UserError(f"--output {asked.output}: {reason_of(error)}") from error
    table = {}
    for name, (options, paths) in sources.items():
        seeds = {seed: measure(load_trained(path), asked.scenes) for seed, path in paths.items()}
        table[name] = Variant(options, seeds)
    print(markdown(table))
    if asked.output is not None:
        plain = {name: vars(variant) for name, variant in table.items()}
        write_json(asked.output / "giveaway.json", {"scenes": asked.scenes, "variants": plain})
        save = partial(draw(table).savefig, dpi=150, format="png")
        write_whole(asked.output / "giveaway.png", save)


if __name__ == "__main__":
    sys.exit(main())
