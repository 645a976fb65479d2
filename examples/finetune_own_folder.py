"""Fine-tune retrieval on your own images and captions, and evaluate it, from Python.

python examples/finetune_own_folder.py [IMAGES TRAIN.json VAL.json]

Without arguments it makes a folder of rendered scenes and caption files first, in outputs/own, to
show what they look like. The runs are those of two shipped YAML files; options are the same as in a
shell. Prints the recalls of the evaluation.
"""

import json
import sys
from pathlib import Path

from softmask_plugin import launch
from softmask_plugin.datasets.scene_render import render
from softmask_plugin.datasets.scenes import captions, make_scenes

YAML = "lavis_configs/projects/captions_folder/{}.yaml"


def main(images: str = "", train: str = "", val: str = "", *options: str) -> None:
    if not images:
        images, train, val = make_folder(Path("outputs/own"))
    data = [f"datasets.captions_folder.images={images}"]
    data += [f"datasets.captions_folder.captions.{split}={train if split == 'train' else val}"
             for split in ("train", "val")]  # fmt: skip
    runner, _ = launch.run(
        YAML.format("train/pretrain_tiny"),
        [*data, "run.output_dir=outputs/own/train", *options],
    )

    run = runner.output_dir  # has the vocabulary as well, made from your captions
    _, results = launch.run(
        YAML.format("eval/retrieval_tiny"),
        [
            f"datasets.captions_folder.images={images}",
            f"datasets.captions_folder.captions.test={val}",
            f"model.tokenizer={run / 'vocab.txt'}",
            f"model.pretrained={run / 'checkpoint_best.pth'}",
            "run.output_dir=outputs/own/evaluate",
        ],
        evaluate=True,
    )
    recalls = results["test"] if results else {}
    print(f"text R@10 {recalls['txt_r10']:.1f}%, image R@10 {recalls['img_r10']:.1f}%")


def make_folder(folder: Path) -> tuple[str, str, str]:
    """Images and two caption files, in the simplest of the forms that are read."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 400), ("val", 50)):
        rows = []
        for i, scene in enumerate(make_scenes(split, count, seed=1, objects=2, heldout=0.125)):
            render(scene, 96).save(folder / "images" / f"{split}_{i}.png")
            texts = [caption.text for caption in captions(scene)]
            rows.append({"image": f"{split}_{i}.png", "caption": texts})
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(folder / "images"), str(folder / "train.json"), str(folder / "val.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
