"""Search a folder of images by text, ranked as in the evaluation of the model's run.

    python examples/search_folder.py [--images FOLDER] [--query "a red circle"] [--checkpoint FILE]

The defaults are the bundled model and 200 rendered scenes, in files named after what they show.
Prints five images, best first, with the probability of a match and the similarity.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from softmask_plugin import load_trained
from softmask_plugin.datasets.images import open_rgb
from softmask_plugin.datasets.scenes import captions, make_scenes, render
from softmask_plugin.errors import UserError
from softmask_plugin.explain.gallery import Gallery, readable_images


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--query", default="a large blue circle above a small red diamond")
    parser.add_argument("--checkpoint", default="shipped:scenes_tiny")
    given = parser.parse_args()

    try:
        if given.images is not None:
            search(given.images, given.query, given.checkpoint)
        else:
            with TemporaryDirectory() as folder:
                save_scenes(Path(folder))
                search(Path(folder), given.query, given.checkpoint)
    except UserError as error:
        sys.exit(str(error))


def search(folder: Path, query: str, checkpoint: str) -> None:
    files, skipped = readable_images(folder)  # in its subfolders, too
    if skipped:
        print(f"unreadable images left out: {skipped}")
    gallery = Gallery(load_trained(checkpoint), map(open_rgb, files))  # encodes each image once
    for hit in gallery.search(query, count=5):
        print(f"{hit.match:.3f}  {hit.similarity:+.3f}  {files[hit.index].relative_to(folder)}")


def save_scenes(folder: Path) -> None:
    for scene in make_scenes("test", 200):
        render(scene, 60).save(folder / f"{captions(scene)[0].text}.png")


if __name__ == "__main__":
    main()
