"""Fine-tune retrieval on your own images and captions; evaluate before and after.

    python examples/finetune_own_folder.py [--data IMAGES TRAIN.json TEST.json]
        [--checkpoint FILE] [--options run.max_epoch=2 ...]

IMAGES is a folder. The default data are scenes with three objects, rendered into outputs/own; the
default checkpoint is the bundled model, which was trained on scenes with two.
Prints the percentage of images whose caption ranks first (and among the first ten), and of captions
whose image does. finetune_own_folder.yaml, beside this file, configures the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from softmask_plugin import launch
from softmask_plugin.config.check import option
from softmask_plugin.datasets.scenes import captions, make_scenes, render

YAML = Path(__file__).with_suffix(".yaml")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs=3, metavar=("IMAGES", "TRAIN", "TEST"))
    parser.add_argument("--checkpoint", default="shipped:scenes_tiny")
    parser.add_argument("--options", nargs="*", default=[])
    given = parser.parse_args()
    images, train, test = given.data or save_scenes(Path("outputs/own/data"))

    options = [
        option("model.pretrained", given.checkpoint),
        option("datasets.captions_folder.images", images),
        option("datasets.captions_folder.captions.train", train),
        option("datasets.captions_folder.captions.test", test),
        *given.options,
    ]
    _, before = launch.run(YAML, options, evaluate=True)
    runner, after = launch.run(YAML, options)
    show("before", before)
    show("after", after)
    print(f"the fine-tuned model: {runner.output_dir}")


def show(when: str, results: Any) -> None:
    recalls = results["test"]
    print(
        f"{when}: caption R@1 {recalls['txt_r1']:.1f} (R@10 {recalls['txt_r10']:.1f}), "
        f"image R@1 {recalls['img_r1']:.1f} (R@10 {recalls['img_r10']:.1f})"
    )


def save_scenes(folder: Path) -> tuple[Path, Path, Path]:
    """Write images and two caption files, in the simplest format."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 2000), ("test", 200)):
        rows = []
        for i, scene in enumerate(make_scenes(split, count, seed=1, objects=3)):
            name = f"{split}_{i}.png"
            render(scene, 60).save(folder / name)
            rows.append({"image": name, "caption": [caption.text for caption in captions(scene)]})
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder, folder / "train.json", folder / "test.json"


if __name__ == "__main__":
    main()
