"""Search a folder of images by text: encode all images once, then one product per query.

    python examples/search_folder.py [--images FOLDER] [--query "a red circle"] [--checkpoint FILE]

The defaults are the bundled model and 200 rendered scenes, in files named after what they show.
Prints the five most similar images with their cosines, best first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import softmask_plugin  # noqa: F401  (first: registers the models, and lets LAVIS import)

# isort: split
import torch
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.images import open_rgb
from softmask_plugin.datasets.scenes import captions, make_scenes, render


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--query", default="a red circle above a blue star")
    parser.add_argument("--checkpoint", default="shipped:scenes_tiny")
    given = parser.parse_args()

    if given.images is not None:
        search(given.images, given.query, given.checkpoint)
    else:
        with TemporaryDirectory() as folder:
            save_scenes(Path(folder))
            search(Path(folder), given.query, given.checkpoint)


def search(folder: Path, query: str, checkpoint: str) -> None:
    model, vis, txt = load_model_and_preprocess("softmask_feature_extractor", "tiny", is_eval=True)
    model.load_checkpoint(checkpoint)

    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        sys.exit(f"no .jpg, .jpeg or .png in {folder}")
    batches = [files[i : i + 64] for i in range(0, len(files), 64)]
    features = []
    for batch in batches:
        images = torch.stack([vis["eval"](open_rgb(file)) for file in batch])
        extracted = model.extract_features({"image": images}, mode="image")
        features.append(extracted.image_embeds_proj[:, 0])  # unit vectors of [CLS]
    text = model.extract_features({"text_input": [txt["eval"](query)]}, mode="text")
    cosines = torch.cat(features) @ text.text_embeds_proj[0, 0]

    best = cosines.topk(min(5, len(files)))
    for cosine, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{cosine:+.3f}  {files[i].name}")


def save_scenes(folder: Path) -> None:
    for scene in make_scenes("test", 200):
        render(scene, 60).save(folder / f"{captions(scene)[0].text}.png")


if __name__ == "__main__":
    main()
