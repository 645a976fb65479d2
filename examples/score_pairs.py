"""How well does each text describe each image? Matching scores (ITM) and cosines (ITC).

python examples/score_pairs.py CHECKPOINT

Prints a table of scores for three rendered scenes and their captions: the diagonal should win.
`make demo` leaves a checkpoint in outputs/demo/pretrain/<run>/.
"""

import sys

import torch

import softmask_plugin  # noqa: F401  (first: registers the models, and makes LAVIS import)

# isort: split
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.scene_render import render
from softmask_plugin.datasets.scenes import captions, make_scenes


def main(checkpoint: str) -> None:
    model, vis, txt = load_model_and_preprocess(
        "softmask_image_text_matching", "tiny", is_eval=True
    )
    model.load_checkpoint(checkpoint)

    scenes = make_scenes("test", 3, seed=0, objects=2, heldout=0.125)
    images = torch.stack([vis["eval"](render(scene, 60)) for scene in scenes])
    texts = [txt["eval"](captions(scene)[0].text) for scene in scenes]

    with torch.no_grad():
        cosines = model({"image": images, "text_input": texts}, match_head="itc")
        # Every image with every text: pair i of the batch is (image i, text i)
        pairs = {"image": images.repeat_interleave(len(texts), dim=0), "text_input": texts * 3}
        matches = model(pairs, match_head="itm").softmax(dim=1)[:, 1].view(3, 3)

    for j, text in enumerate(texts):
        print(f"text {j}: {text}")
    for i in range(3):
        row = [f"{m:.2f} ({c:+.2f})" for m, c in zip(matches[i], cosines[i], strict=True)]
        print(f"image {i}: match (cosine) with text 0, 1, 2: {', '.join(row)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
