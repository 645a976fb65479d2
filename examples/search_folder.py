"""Search a folder of images by text: features of all images once, then one product per query.

python examples/search_folder.py CHECKPOINT "a red circle above a blue star" [FOLDER]

Prints the five most similar images. Without a folder it searches 200 rendered scenes, which it
saves to outputs/scenes_images. `make demo` leaves a checkpoint in outputs/demo/pretrain/<run>/.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import softmask_plugin  # noqa: F401  (first: registers the models, and makes LAVIS import)

# isort: split
from lavis.models import load_model_and_preprocess

from softmask_plugin.datasets.scene_render import render
from softmask_plugin.datasets.scenes import captions, make_scenes


def main(checkpoint: str, query: str, folder: str = "outputs/scenes_images") -> None:
    model, vis, txt = load_model_and_preprocess("softmask_feature_extractor", "tiny", is_eval=True)
    model.load_checkpoint(checkpoint)
    if len(sys.argv) < 4:
        save_scenes(Path(folder))

    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".jpg", ".jpeg", ".png"))
    images = [vis["eval"](Image.open(file).convert("RGB")) for file in files]
    features = torch.cat(
        [
            model.extract_features({"image": batch}, mode="image").image_embeds_proj[:, 0]
            for batch in torch.stack(images).split(64)
        ]
    )
    text = model.extract_features({"text_input": [txt["eval"](query)]}, mode="text")
    similarity = features @ text.text_embeds_proj[0, 0]  # unit vectors of the two [CLS]

    best = similarity.topk(min(5, len(files)))
    for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{score:+.3f}  {files[i]}")


def save_scenes(folder: Path) -> None:
    """Render some scenes, named by what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene in make_scenes("test", 200, seed=0, objects=2, heldout=0.125):
        name = captions(scene)[0].text.replace(" ", "_")
        render(scene, 60).save(folder / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
