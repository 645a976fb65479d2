"""Which part of an image does each word mean? Draw heat maps, soft masks and match scores.

python examples/explain_words.py [checkpoint.pth] [words.png]

Without a checkpoint the weights are random; `make demo` leaves a trained one in
outputs/demo/pretrain/<run>/.
"""

import sys

import numpy as np

import softmask_plugin  # noqa: F401  (first: registers the models, and makes LAVIS import)

# isort: split
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.scene_render import render
from softmask_plugin.datasets.scenes import captions, make_scenes
from softmask_plugin.explain import explain
from softmask_plugin.report import word_panel


def main(checkpoint: str | None = None, output: str = "words.png") -> None:
    model, vis, txt = load_model_and_preprocess("softmask_pretrain", "tiny", is_eval=True)
    if checkpoint is not None:
        model.load_checkpoint(checkpoint)

    (scene,) = make_scenes("test", 1, seed=0, objects=2, heldout=0.125)
    caption = captions(scene)[0]
    image = vis["eval"](render(scene, 240))
    (explanation,) = explain(model, image[None], [txt["eval"](caption.text)])

    print(f"{explanation.caption}: match {explanation.score:.0%}")
    for word, score in zip(explanation.words, explanation.masked_scores.tolist(), strict=True):
        print(f"  {word:10} hidden: match {score:.0%}")

    words = [index for index, _, role in caption.boxes if role != "size"]
    panel = word_panel(np.asarray(render(scene, 240)), explanation, words, caption.boxes)
    panel.savefig(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
