"""Where does each word look? Heat maps, soft masks and their effect on the match.

    python examples/explain_words.py [--checkpoint FILE] [--output words.png]

The default is the bundled model. Prints the probability of a match and, for each word of the
caption, the probability with that word's soft mask on. Draws the words for colours and shapes.
A model trained with the soft mask and ``soft_mask.negatives``, such as the bundled one, has learnt
to match without the masked patches, so its match hardly moves. In a model trained without the mask,
a fall says that the match relied on them.
"""

from __future__ import annotations

import argparse

import numpy as np

import softmask_plugin  # noqa: F401  (first: registers the models, and lets LAVIS import)

# isort: split
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.scenes import captions, make_scenes, render
from softmask_plugin.explain import Shown, explain, word_panels


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

    # The same scene with more pixels, to look at; a white frame outlines the named object
    picture = np.asarray(render(scene, 240))
    words = [index for index, _, role in caption.boxes if role != "size"]
    panel = word_panels(Shown(picture, explanation, words, caption.boxes))
    panel.savefig(given.output, dpi=200, bbox_inches="tight")
    print(f"figure: {given.output}")


if __name__ == "__main__":
    main()
