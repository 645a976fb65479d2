"""Does a mask give the match away? ``python -m benchmarks.giveaway outputs/ablation/scenes``

A mask says nothing about whether a caption is right. So a model that rates wrong captions higher
once something is hidden has learnt to take the mask itself for a sign of a match: without
``soft_mask.negatives`` only matching pairs are ever masked in training. Scored are held-out scenes,
each with a caption and with the same one but for a wrong colour, plain and under each word's mask,
by what `softmask ablate` trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import matplotlib as mpl
from matplotlib.figure import Figure
from tqdm import tqdm

from softmask_plugin.ablate.run import RESULT
from softmask_plugin.datasets.scene_render import render
from softmask_plugin.datasets.scenes import captions, make_scenes
from softmask_plugin.explain import Explanation, explain
from softmask_plugin.explore import wrong_caption
from softmask_plugin.report.figures import ACCENT, MUTED, STYLE
from softmask_plugin.trained import Trained, load_trained


@dataclass(frozen=True)
class Matches:
    """Mean probability of a match, in percent: plain, and under the masks of all words."""

    right: float
    right_masked: float
    wrong: float
    wrong_masked: float


COLUMNS = [field.name.replace("_", ", ") for field in fields(Matches)]


def measure(trained: Trained, count: int) -> Matches:
    """Score ``count`` held-out scenes with a right and a wrong caption each."""
    found: list[list[Explanation]] = []
    scenes = make_scenes("test", count)
    for scene in tqdm(scenes, leave=False, disable=None):
        image = trained.image_processor(render(scene, trained.model.options.image_size))
        texts = [captions(scene)[0].text, wrong_caption(scene)]
        pair = [trained.text_processor(text) for text in texts]
        found.append(explain(trained.model, image.expand(2, -1, -1, -1), pair))
    right, wrong = zip(*found, strict=True)
    return Matches(*_means(right), *_means(wrong))


def _means(found: Sequence[Explanation]) -> tuple[float, float]:
    plain = statistics.fmean(each.score for each in found)
    masked = statistics.fmean(each.masked_scores.mean().item() for each in found)
    return 100 * plain, 100 * masked


def checkpoints(folder: Path, only: Sequence[str]) -> dict[str, list[Path]]:
    """The checkpoints of an ablation's variants, one for each seed; of all, or in this order."""
    found: dict[str, list[Path]] = {}
    for variant in only or sorted(each.name for each in folder.glob("*/")):
        for file in sorted(folder.glob(f"{variant}/seed_*/pretrain/{RESULT}")):
            result = json.loads(file.read_text(encoding="utf-8"))
            path = file.parent / result["run"] / result["checkpoint"]
            found.setdefault(variant, []).append(path)
    return found


def markdown(table: dict[str, list[Matches]]) -> str:
    """A line for each variant: means over seeds, and from what to what they range."""
    lines = [f"| variant | {' | '.join(COLUMNS)} | seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, seeds in table.items():
        columns = zip(*map(astuple, seeds), strict=True)
        cells = [f"{statistics.fmean(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def draw(table: dict[str, list[Matches]]) -> Figure:
    """Arrows from the plain match to that under a mask, of right and of wrong captions."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 0.8 + 0.45 * len(table)), layout="constrained")
        axes = figure.subplots()
        for place, seeds in enumerate(table.values()):
            means = [statistics.fmean(column) for column in zip(*map(astuple, seeds), strict=True)]
            for start, end, colour, offset in (
                (*means[:2], MUTED, -0.14),
                (*means[2:], ACCENT, 0.14),
            ):
                axes.annotate(
                    "",
                    (end, place + offset),
                    (start, place + offset),
                    arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0},
                )
                axes.plot(start, place + offset, "o", color=colour, markersize=4)
        axes.set_yticks(range(len(table)), list(table))
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        for label, colour in (("right caption", MUTED), ("wrong caption", ACCENT)):
            axes.plot([], [], "o-", color=colour, markersize=4, label=label)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        axes.set_xlabel("match in percent: plain (dot) and with a word's region hidden (arrow)")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write it as JSON with each seed, and as a picture, where that is asked."""
    parser = argparse.ArgumentParser(description="Does a mask give the match away?")
    parser.add_argument("folder", nargs="?", type=Path, help="of an ablation on scenes")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT")
    parser.add_argument("--scenes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for giveaway.json and .png")
    asked = parser.parse_args(argv)
    shipped = {"scenes_tiny": [None]}
    sources = checkpoints(asked.folder, asked.only) if asked.folder else shipped
    table = {
        name: [measure(load_trained(path), asked.scenes) for path in paths]
        for name, paths in sources.items()
    }
    print(markdown(table), end="")
    if asked.output is not None:
        asked.output.mkdir(parents=True, exist_ok=True)
        plain = {name: [vars(each) for each in seeds] for name, seeds in table.items()}
        text = json.dumps({"scenes": asked.scenes, "variants": plain}, indent=2)
        (asked.output / "giveaway.json").write_text(text + "\n", encoding="utf-8")
        draw(table).savefig(asked.output / "giveaway.png", dpi=150)


if __name__ == "__main__":
    main()
