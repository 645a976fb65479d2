"""Explain how a picture matches a caption: as a figure, a table and plain values."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.errors import UserError
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.explain.pairs import Explanation, explain, numbers_of, words_of
from softmask_plugin.explain.trained import Trained, load_trained
from softmask_plugin.models.rerank import progress_bar
from softmask_plugin.pointing import Box, hits, is_box
from softmask_plugin.processors.image import ImageEvalProcessor
from softmask_plugin.processors.text import CaptionProcessor
from softmask_plugin.tokenization import as_list

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
DPI = 300
FOREIGN = (
    "the bundled model knows only rendered scenes and their captions: for other images or words "
    "its match means nothing; load the checkpoint of a model of yours"
)


@dataclass(frozen=True)
class Named:
    """A phrase of a caption, by the numbers of its words, and the boxes of what it names."""

    phrase: str
    words: list[int]
    boxes: Sequence[Box]


@dataclass(frozen=True, repr=False)
class ImageExplanation(Explanation):
    """An explanation, its picture, (H, W, 3) uint8, and phrases whose place is known.

    The model saw the picture squeezed to a square: the rows and columns of a map divide its height
    and width evenly.
    """

    image: np.ndarray
    named: Sequence[Named] = ()

    def figure(self, width: float | None = None) -> Figure:
        """Draw for each word the heat map over the picture, the soft mask, and the scores.

        Args:
            width: Inches, 2 to 40; 3.3 fits a column of most papers. Letters keep their size, 6.5
                to 8 points. None: each picture is 1.4 inches wide.

        Raises:
            UserError: The width is out of range.
        """
        require_width(width)
        boxes = [
            (word, box, "") for each in self.named for word in each.words for box in each.boxes
        ]
        shown = Shown(self.image, self, range(len(self.words)), boxes)
        return word_panels(shown, dpi=DPI, width=width)

    def pointing(self) -> dict[str, dict[str, float]]:
        """For each phrase whose place is known, the share of its map's peaks in its own boxes
        (``own``) and otherwise in those of other phrases (``other``), and the share of patches in
        its own (``chance``)."""
        found = {}
        for each in self.named:
            heat = self.cams[each.words].mean(dim=0)[None].numpy()
            rest = [box for other in self.named if other is not each for box in other.boxes]
            (own,), (chance,) = hits(heat, [each.boxes])
            (any_,), _ = hits(heat, [[*each.boxes, *rest]])
            values = {"own": own, "other": any_ - own, "chance": chance}
            found[each.phrase] = {name: float(value) for name, value in values.items()}
        return found

    def _repr_png_(self) -> bytes:
        """Notebooks show the figure."""
        content = BytesIO()
        self.figure().savefig(content, format="png")
        return content.getvalue()

    def save(self, path: str | Path, width: float | None = None) -> Path:
        """Write :meth:`figure` as PNG, PDF or SVG, by the path's suffix.

        Raises:
            UserError: Another suffix, a width out of range, or the file cannot be written.
        """
        import matplotlib as mpl

        require_format(path)
        path, figure = Path(path), self.figure(width)
        undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with mpl.rc_context({"pdf.fonttype": 42}):  # text can be searched and selected
                figure.savefig(path, dpi=DPI, metadata=undated.get(path.suffix.lower()))
        except OSError as error:
            raise UserError(f"cannot write the figure {path} ({error.strerror})") from error
        return path

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON; maps are lists of rows, from the top."""
        return {
            "caption": self.caption,
            "read": self.kept,
            "score": self.score,
            "image_size": list(self.image.shape[:2]),
            "grid": list(self.cams.shape[1:]),
            "mask": {"kind": self.kind, "strength": self.strength},
            "words": [
                {
                    "word": word,
                    "masked_score": self.masked_scores[i].item(),
                    "heat_map": self.cams[i].tolist(),
                    "soft_mask": self.masks[i].tolist(),
                }
                for i, word in enumerate(self.words)
            ],
            **({"pointing": self.pointing()} if self.named else {}),
        }

    def table(self) -> str:
        """The match and, for each word, the masked match, as text."""
        cut = f" ... ({self.cut})" if self.cut else ""
        lines = [f"match {self.score:.3f}: {self.kept}{cut}"]
        width = max((len(word) for word in self.words), default=0)
        for word, masked in zip(self.words, self.masked_scores.tolist(), strict=True):
            lines.append(f"  {word:<{width}}  {masked:.3f} when it is masked")
        for phrase, at in self.pointing().items():
            where = "its own box" if at["own"] else "another's box" if at["other"] else "no box"
            lines.append(f"'{phrase}' peaks in {where} (chance {at['chance']:.2f})")
        return "\n".join(lines)


def explain_image(
    image: str | Path | Image.Image | np.ndarray,
    caption: str,
    model: Any = None,
    words: Sequence[str] | str | None = None,
    arch: str | None = None,
    model_type: str | None = None,
    boxes: Mapping[str, Sequence[Box]] | None = None,
) -> ImageExplanation:
    """Explain how a picture matches a caption: where each word looks, and what masking it does.

    A caption that is too long for the model or its text processor is cut, with a warning in the
    log; the result's ``kept`` is what remains. Another warning says if the bundled model is shown
    anything but a rendered scene.

    Args:
        image: A file, a PIL image, or a uint8 array (H, W, 3) or (H, W).
        caption: Any text; the model's text processor cleans it.
        model: A checkpoint (file or URL), a model with a matching head, of this plugin or of LAVIS,
            or for many calls the result of :func:`load_trained`; None: the bundled tiny model.
        words: The word or words to explain, at every place in the caption; None: all.
        arch, model_type: The model of a checkpoint that does not name one, such as
            ``softmask_image_text_matching`` and ``base`` for ALBEF.pth.
        boxes: Where phrases of the caption are: the box or boxes ``(x0, y0, x1, y1)`` in [0, 1] of
            each, which the figure outlines and ``pointing`` compares with the maps.

    Raises:
        UserError: The image or the checkpoint cannot be loaded, the model has no matching head, the
            caption has no word or not the ones to explain, a box is empty or not in [0, 1], or a
            score is NaN or infinite.
    """
    if isinstance(image, (str, Path)):
        picture = open_rgb(image)
    else:
        picture = ImageEvalProcessor.picture(image)
    if model is None or isinstance(model, (str, Path)):
        model = load_trained(model, arch, model_type)
    elif not isinstance(model, Trained):
        model = Trained.of(model)
    processor = model.text_processor
    cleaned = processor(caption)
    (found,) = explain(model.matcher, model.image_processor(picture)[None], [cleaned])
    if not found.words:
        raise UserError(f"the caption '{caption}' has no word to explain: say what the image shows")
    limit = f"model.max_txt_len is {model.matcher.caption_tokenizer.max_length}"
    if isinstance(processor, CaptionProcessor):
        if found.kept == cleaned:  # only the processor can have cut it
            limit = f"its text processor's max_words is {processor.max_words}"
        found = replace(found, caption=" ".join(processor.words(caption)))
    if found.cut:
        logging.getLogger(__name__).warning("%s (%s)", found.cut, limit)
    tokenizer = model.matcher.caption_tokenizer.tokenizer
    known = tokenizer.get_vocab().keys() - {tokenizer.unk_token}
    if model.bundled and not (is_scene(picture) and known >= set(found.words)):
        logging.getLogger(__name__).warning(FOREIGN)
    named = [_named(found, model, phrase, places) for phrase, places in (boxes or {}).items()]
    if words is not None:
        chosen = (_numbers(found, model, word) for word in as_list(words))
        kept = sorted({*chain(*chosen, *(each.words for each in named))})
        parts = {name: getattr(found, name)[kept] for name in ("cams", "masks", "masked_scores")}
        found = replace(found, words=[found.words[i] for i in kept], **parts)
        named = [replace(each, words=[kept.index(i) for i in each.words]) for each in named]
    return ImageExplanation(**vars(found), image=np.asarray(picture), named=named)


def explain_file(
    captions: str | Path, images: str | Path, output: str | Path, model: Trained
) -> tuple[int, int]:
    """Explain the pairs of a caption file: a figure each, all values in ``explanations.jsonl``.

    Args:
        captions: A file that ``parse_captions`` takes.
        images: Folder of the images.
        output: Folder for the figures, numbered in the file's order, and the values.

    Returns:
        The number of pairs explained, and that of pairs left out, with a warning, because their
        image cannot be read.

    Raises:
        UserError: The caption file is malformed, or no image can be read.
    """
    output, explained = Path(output), 0
    if not Path(images).is_dir():
        raise UserError(f"no folder {images}: give the folder of the images")
    rows = parse_captions(captions, options=TableOptions(root=Path(images)))
    pairs = [(row["image"], caption) for row in rows for caption in row["caption"]]
    output.mkdir(parents=True, exist_ok=True)
    if model.bundled:  # say so once
        logging.getLogger(__name__).warning(FOREIGN)
        model = replace(model, bundled=False)
    with (output / "explanations.jsonl").open("w", encoding="utf-8") as file:
        for name, caption in progress_bar(pairs, desc="pairs", unit="pair"):
            try:
                found = explain_image(Path(images, name), caption, model)
            except UnreadableImageError as error:
                logging.getLogger(__name__).warning("left out: %s", error)
                continue
            explained += 1
            figure = found.save(output / f"{explained:06d}.png").name
            file.write(json.dumps({"image": name, "figure": figure, **found.as_dict()}) + "\n")
    if not explained:
        raise UserError(f"no image of {captions} can be read in {images}: give their folder")
    return explained, len(pairs) - explained


def require_format(path: str | Path) -> None:
    """Raise UserError unless a figure's path ends with one of ``FORMATS``."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"the figure's name '{path}' must end with {', '.join(FORMATS)}")


def require_width(width: float | None) -> None:
    """Raise UserError unless a figure's width is None or 2 to 40 inches."""
    if width is not None and not 2 <= width <= 40:
        raise UserError(f"the figure's width is {width:g}: it must be 2 to 40 inches")


def is_scene(picture: Image.Image) -> bool:
    """Whether most of the picture is the light grey ground of rendered scenes."""
    pixels = np.asarray(picture.resize((64, 64))).astype(int)
    low, high = pixels.min(axis=2), pixels.max(axis=2)
    return bool(((low > 200) & (high < 250) & (high - low < 20)).mean() > 0.5)


def _named(found: Explanation, model: Trained, phrase: str, boxes: Sequence[Box]) -> Named:
    """Find a phrase, cleaned and split as the caption was, and check its boxes."""
    try:
        boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in np.reshape(boxes, (-1, 4)).tolist()]
    except ValueError as error:
        raise UserError(f"the box of '{phrase}' is {boxes}: give its four sides") from error
    if not boxes:
        raise UserError(f"no box is given for '{phrase}'")
    for box in boxes:
        if not is_box(box):
            raise UserError(
                f"the box of '{phrase}' is {', '.join(f'{side:g}' for side in box)}: give left, "
                "top, right and bottom in [0, 1], as shares of the image"
            )
    return Named(phrase, _numbers(found, model, phrase), boxes)


def _numbers(found: Explanation, model: Trained, phrase: str) -> list[int]:
    parts = words_of(model.matcher, model.text_processor(phrase)) or [phrase]
    return numbers_of(found.words, parts)
