"""From a picture and a caption to what each word refers to, as a figure and as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softmask_plugin.datasets.images import open_rgb, to_rgb
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.explain.pairs import Explanation, explain, words_of
from softmask_plugin.explain.trained import Trained, load_trained
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.processors.text import CaptionProcessor

if TYPE_CHECKING:  # matplotlib takes a second to import, and only figures need it
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FORMATS = (".png", ".pdf", ".svg")
PRINTED: dict[Any, Any] = {"pdf.fonttype": 42}  # letters that a PDF's reader can search and select
DPI = 300


@dataclass(frozen=True)
class ImageExplanation(Explanation):
    """An explanation, and the picture that it is of.

    Attributes:
        image: the picture as it was given, (H, W, 3) uint8. The model saw it squeezed to a square,
            so that a map's rows and columns divide this picture's height and width evenly.
    """

    image: np.ndarray

    def figure(self, width: float | None = None) -> Figure:
        """For each word the heat map over the picture, the soft mask, and the scores.

        Args:
            width: of the figure in inches, in which letters have 6.5 to 8 points; 3.3 fits most
                papers' columns. None: each picture is 1.4 wide.

        Raises:
            UserError: the width is not 2 to 40.
        """
        from softmask_plugin.explain.figure import Shown, word_panels

        shown = Shown(self.image, self, range(len(self.words)))
        return word_panels([shown], DPI, require_width(width))

    def save(self, path: str | Path, width: float | None = None) -> Path:
        """Write :meth:`figure`; the name's suffix says whether as PNG, PDF or SVG.

        Raises:
            UserError: another suffix, a width that is not 2 to 40, or the file cannot be written.
        """
        import matplotlib as mpl

        path = require_format(path)
        figure = self.figure(width)
        undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with mpl.rc_context(PRINTED):
                figure.savefig(path, dpi=DPI, metadata=undated.get(path.suffix))
        except OSError as error:
            raise UserError(f"cannot write the figure {path} ({error.strerror})") from error
        return path

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; maps are lists of rows, from the top."""
        return {
            "caption": self.caption,
            "read": self.read,
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
        }

    def table(self) -> str:
        """The scores as text: that of the match, then of each word's masked match."""
        width = max((len(word) for word in self.words), default=0)
        return "\n".join(
            [
                f"match {self.score:.3f}: {self.read}" + (f" ... ({self.cut})" if self.cut else ""),
                *(
                    f"  {word:<{width}}  {masked:.3f} when it is masked"
                    for word, masked in zip(self.words, self.masked_scores.tolist(), strict=True)
                ),
            ]
        )

    def write_json(self, path: str | Path) -> None:
        """Write :meth:`as_dict` as JSON into a file, or with ``-`` to the standard output.

        Raises:
            UserError: the file cannot be written.
        """
        text = json.dumps(self.as_dict()) + "\n"
        if str(path) == "-":
            sys.stdout.write(text)
            return
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror})") from error


def explain_image(
    image: str | Path | Image.Image | np.ndarray,
    caption: str,
    model: Trained | AlignedBase | str | Path | None = None,
    words: Sequence[str] | str | None = None,
    arch: str | None = None,
    model_type: str | None = None,
) -> ImageExplanation:
    """Explain how a picture matches a caption: where each word looks, and what masking it does.

    A caption that is too long for the model or its text processor is cut, which is logged as a
    warning and told by the result's ``read``.

    Args:
        image: a file, a PIL image, or an array (H, W, 3) or (H, W) of uint8.
        caption: any text; the model's text processor cleans it.
        model: a checkpoint (file or URL); a model with a matching head, with the default
            processors; or what :func:`load_trained` gave, for many calls.
        words: the one or those of the caption to explain, wherever they stand; None: all.
        arch, model_type: the model that a checkpoint without a configuration is of, such as
            ``softmask_image_text_matching`` and ``base`` of ALBEF.pth.

    Raises:
        UserError: the image or the checkpoint cannot be read, the model has no matching head, the
            caption has no word or lacks one of those named, or a score is NaN or infinite.
    """
    picture = _open(image)
    if model is None or isinstance(model, (str, Path)):
        model = load_trained(model, arch, model_type)
    elif not isinstance(model, Trained):
        model = Trained.of(model)
    cleaned = model.text_processor(caption)
    if not words_of(model.model, cleaned):
        raise UserError(f"the caption '{caption}' has no word to explain: say what the image shows")
    (found,) = explain(model.model, model.image_processor(picture)[None], [cleaned])
    limit = f"model.max_txt_len is {model.model.options.max_txt_len}"
    processor = model.text_processor
    if isinstance(processor, CaptionProcessor):
        if found.read == cleaned:  # so that only the processor can have cut it
            limit = f"its text processor's max_words is {processor.max_words}"
        found = replace(found, caption=" ".join(processor.words(caption)))
    if found.cut:
        log.warning("%s (%s)", found.cut, limit)
    if words is not None:
        words = [words] if isinstance(words, str) else words
        found = _only(found, [w for each in words for w in _read(model, each, found.words)])
    parts = {field.name: getattr(found, field.name) for field in fields(found)}
    return ImageExplanation(**parts, image=np.asarray(picture))


def require_format(path: str | Path) -> Path:
    """Return the path of a figure; UserError where its suffix is none of ``FORMATS``."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"the figure's name '{path}' must end with {', '.join(FORMATS)}")
    return path


def require_width(width: float | None) -> float | None:
    """Return a figure's width in inches, None where none is given; UserError unless 2 to 40."""
    if width is not None and not 2 <= width <= 40:
        raise UserError(f"the figure's width is {width:g}: it must be 2 to 40 inches")
    return width


def _open(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, (str, Path)):
        return open_rgb(image)
    if isinstance(image, np.ndarray):
        image = _of_array(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"an image must be a file, a PIL image or an array, not {image!r:.80}")
    return to_rgb(image)


def _of_array(pixels: np.ndarray) -> Image.Image:
    shaped = pixels.size > 0 and (pixels.ndim == 2 or pixels.shape[2:] == (3,))
    if pixels.dtype != np.uint8 or not shaped:
        raise UserError(
            "an image as an array must be (H, W, 3) or (H, W) of uint8, 0 to 255, not "
            f"{pixels.shape} of {pixels.dtype}"
        )
    return Image.fromarray(pixels)


def _read(model: Trained, word: str, known: Sequence[str]) -> list[str]:
    """A word as the model reads it, which may make several of it."""
    read = words_of(model.model, model.text_processor(word))
    if not read or not set(read) <= set(known):
        raise UserError(f"the caption as the model reads it lacks '{word}': {suggest(word, known)}")
    return read


def _only(found: Explanation, words: Sequence[str]) -> Explanation:
    kept = [i for i, word in enumerate(found.words) if word in words]
    return replace(
        found,
        words=[found.words[i] for i in kept],
        cams=found.cams[kept],
        masks=found.masks[kept],
        masked_scores=found.masked_scores[kept],
    )
