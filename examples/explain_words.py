"""Which part of an image does each word mean? Heat maps, soft masks and what they do to the match.

    python examples/explain_words.py [--checkpoint FILE] [--output words.png]

Without a checkpoint it takes the shipped model. Prints the probability of a match, and for each
word of the caption that probability with the word's soft mask applied; draws the words that name
something. A model trained with the soft mask, such as the shipped one, has learnt to match without
what is hidden: its match hardly moves, and rather up than down. In a model trained without it, a
fall says that the model relied on what is hidden.
"""

from __future__ import annotations

import argparse

import numpy as np

import softmask_plugin  # noqa: F401  (first: registers the models, and makes LAVIS import)

# isort: split
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.scenes import captions, make_scenes, render
from softmask_plugin.explain import explain, word_panel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="shipped:scenes_tiny")
    parser.add_argument("--output", default="words.png")
    given = parser.parse_args()

    model, vis, txt = load_model_and_preprocess(
        "softmask_image_text_matching", "tiny", is_eval=True
    )
    model.load_checkpoint(given.checkpoint)

    (scene,) = make_scenes("test", 1)
    caption = captions(scene)[0]
    image = vis["eval"](render(scene, 60))
    (explanation,) = explain(model, image[None], [txt["eval"](caption.text)])

    print(f"{explanation.caption}: match {explanation.score:.2f}")
    for word, score in zip(explanation.words, explanation.masked_scores.tolist(), strict=True):
        print(f"  {word:10} masked: match {score:.2f}")

    # The same scene at more pixels, to look at; a white frame is where the named thing is
    picture = np.asarray(render(scene, 240))
    words = [index for index, _, role in caption.boxes if role != "size"]
    panel = word_panel(picture, explanation, words, caption.boxes)
    panel.savefig(given.output, dpi=200, bbox_inches="tight")
    print(f"figure: {given.output}")


if __name__ == "__main__":
    main()
