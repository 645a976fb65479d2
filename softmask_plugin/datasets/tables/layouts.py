"""Which columns hold what: options for files of one's own, and the layouts of published ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError


@dataclass(frozen=True)
class TableOptions:
    """How to parse a file of rows."""

    place: str = ""  # start of the options' names in errors, as in "datasets.captions_folder."
    keys: Mapping[str, str] = field(default_factory=dict)  # the file's column for one of ours
    separator: str | None = None  # of a CSV; None: found in its first line
    root: Path | None = None  # the images folder, below which absolute image names must be
    annotations: Path | None = None  # VQA's file of answers to a file of questions
    skipped: SkipLog = SkipLog()  # where unusable rows and parts of rows are reported

    @classmethod
    def of(cls, place: str, section: DictConfig, split: str) -> TableOptions:
        """The options of a split of the data set section ``place``; UserError if one is wrong."""
        keys = {str(k)[:-4]: str(v) for k, v in section.items() if v and str(k).endswith("_key")}
        separator = str(section.get("separator") or "").replace("\\t", "\t") or None
        if separator and (len(separator) > 1 or separator in '"\r\n'):
            raise UserError(f"{place}.separator is {separator!r}: it must be one character")
        files = section.get("images"), OmegaConf.select(section, f"annotations.{split}")
        root, annotations = (Path(str(file)).expanduser() if file else None for file in files)
        return cls(f"{place}.", keys, separator, root, annotations)

    @cached_property
    def roots(self) -> list[str]:
        """Spellings of the images folder in absolute image names."""
        folders = {self.root.absolute(), self.root.resolve()} if self.root else ()
        return [folder.as_posix() for folder in folders]

    def below(self, name: str, *folders: str) -> str:
        """Prefix an image name with those of the nested folders that the images folder has."""
        path = ""
        for folder in folders:
            if self.root and folder and os.path.isdir(self.root / path / folder):
                path = f"{path}{folder}/"
        return path + name


PLAIN = TableOptions()


# Published layouts of rows: our columns by theirs, or made of theirs.
LAYOUTS = (
    {"image": "image_name", "caption": "comment"},  # Flickr30k's results.csv
    {"image": "filepath", "caption": "title"},  # open_clip
    {"image": "{Flickr30K_ID}.jpg", "sentence": "sentence2", "label": "gold_label"},  # SNLI-VE
    {"image": "{Flikr30kID}.jpg", "sentence": "sentence2", "label": "gold_label"},  # the same
    {"image": "Flickr30kID", "sentence": "hypothesis", "label": "gold_label"},  # e-SNLI-VE
    {"image": "{image_id}.png", "question": "question"},  # DAQUAR
    {"image0": "{images[0]}", "image1": "{images[1]}"},  # LAVIS's NLVR2
    {"image0": "{pair}-img0.png", "image1": "{pair}-img1.png"},  # NLVR2
    {"image": "filename", "foil": "negative_caption"},  # SugarCrepe
    {"image": "image_file"},  # VALSE
    {"image": "image_path", "caption": "true_caption", "foil": "false_caption"},  # ARO
    {"image": "{image_0}.png", "caption": "caption_0", "foil": "caption_1"},  # Winoground
)


def find_columns(
    row: dict[str, Any], columns: Sequence[str], options: TableOptions
) -> dict[str, Any]:
    """Those of ``columns`` and ``options.keys`` that a row has, under whatever names."""
    keys = {column: options.keys.get(column, column) for column in (*columns, *options.keys)}
    found = {column: row[key] for column, key in keys.items() if key in row}
    if "identifier" in row:  # NLVR2's dev-850-0-1: sentence 1 about the pair dev-850-0
        pair = str(row["identifier"]).rpartition("-")[0]
        folders = pair.partition("-")[0], str(row.get("directory", ""))
        row = row | {"pair": options.below(pair, *folders)}
    row = {key: value for key, value in row.items() if value is not None}  # a short line of a CSV
    for layout in LAYOUTS:
        if found.keys() >= set(columns):
            break
        with suppress(KeyError, IndexError, TypeError):
            made = {c: k.format_map(row) if "{" in k else row[k] for c, k in layout.items()}
            found = {c: value for c, value in made.items() if c not in options.keys} | found
    return found
