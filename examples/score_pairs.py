"""How well does each text describe each image? Matching scores (ITM) and cosines (ITC).

    python examples/score_pairs.py [--checkpoint FILE]

The default is the bundled model. Prints the captions of three scenes, and the scores of each scene
with each caption: the diagonal should win.
"""

from __future__ import annotations

import argparse

import softmask_plugin  # noqa: F401  (first: registers the models, and lets LAVIS import)

# isort: split
import torch
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.scenes import captions, make_scenes, render


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="shipped:scenes_tiny")
    given = parser.parse_args()

    model, vis, txt = load_model_and_preprocess(
        "softmask_image_text_matching", "tiny", is_eval=True
    )
    model.load_checkpoint(given.checkpoint)

    scenes = make_scenes("test", 3)
    images = torch.stack([vis["eval"](render(scene, 60)) for scene in scenes])
    texts = [txt["eval"](captions(scene)[0].text) for scene in scenes]

    with torch.no_grad():
        cosines = model({"image": images, "text_input": texts}, match_head="itc")
        # ITM scores image i with text i, so each image is repeated for each text
        pairs = {"image": images.repeat_interleave(3, dim=0), "text_input": texts * 3}
        matches = model(pairs, match_head="itm").softmax(dim=1)[:, 1].view(3, 3)

    for j, text in enumerate(texts):
        print(f"text {j}: {text}")
    print("match (cosine)" + "".join(f"{f'text {j}':>15}" for j in range(3)))
    for i in range(3):
        cells = [f"{m:.2f} ({c:+.2f})" for m, c in zip(matches[i], cosines[i], strict=True)]
        print(f"image {i}       " + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
