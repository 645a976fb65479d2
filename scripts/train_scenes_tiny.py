"""Train the bundled model and write it to softmask_plugin/assets.

    python scripts/train_scenes_tiny.py [--run FOLDER]   # or: make assets

Trains on rendered scenes (about eight minutes on two idle cores), or takes a finished run with the
same settings. Keeps the weights without momentum encoder in half precision, and evaluates the file
on held-out scenes. The file's metadata and a JSON file beside it say how it was made and how good
it is.
"""

from __future__ import annotations

import argparse
import json
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from softmask_plugin import launch, report
from softmask_plugin.config.check import option
from softmask_plugin.config.options import read_options
from softmask_plugin.demo import EVALUATE, TRAIN
from softmask_plugin.errors import UserError
from softmask_plugin.explain.scenes import pointing
from softmask_plugin.files.checkpoint import ASSETS, open_checkpoint
from softmask_plugin.host.stack import installed
from softmask_plugin.models.features import SoftMaskFeatureExtractor

OPTIONS = [
    "datasets.scenes_pretrain.num.train=20000",
    "run.max_epoch=4",
]
FILE = ASSETS / "scenes_tiny.safetensors"
OUTPUT = Path("outputs/scenes_tiny")


def main() -> None:
    """Train or take a run, export it, and evaluate the exported file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="folder of a finished run with the same settings")
    run = parser.parse_args().run
    if run is None:
        trained, _ = launch.run(TRAIN, [*OPTIONS, option("run.output_dir", OUTPUT / "pretrain")])
        run = trained.output_dir
    config = config_of(run)
    weights = online(open_checkpoint(run / f"checkpoint_{config.run.max_epoch - 1}.pth").state)

    OUTPUT.mkdir(parents=True, exist_ok=True)
    save_file(weights, OUTPUT / FILE.name)
    about = {
        "what": "softmask_pretrain of type tiny, trained on rendered scenes: online weights",
        "command": shlex.join(["softmask", "train", "--cfg-path", TRAIN, "--options", *OPTIONS]),
        "seed": config.run.seed,
        "date": date.today().isoformat(),
        "versions": {name: have for name, have in installed().items() if have},
        "held out": evaluate(OUTPUT / FILE.name),
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    save_file(weights, FILE, texts)
    about["bytes"] = FILE.stat().st_size
    FILE.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=2))


def config_of(run: Path) -> DictConfig:
    """The settings of a run; UserError unless they are those above."""
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    wanted = launch.load_config(TRAIN, OPTIONS)
    same = config.model == wanted.model_cfg and config.datasets == wanted.datasets_cfg
    if not same or config.run.max_epoch != wanted.run_cfg.max_epoch:
        raise UserError(f"{run} was trained with other settings than {TRAIN} {' '.join(OPTIONS)}")
    return config


def online(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that inference needs, MLM head included: no momentum encoder, no queues."""
    section = OmegaConf.load(SoftMaskFeatureExtractor.default_config_path("tiny")).model
    needed = SoftMaskFeatureExtractor(read_options(SoftMaskFeatureExtractor.OPTIONS, section))
    half = {torch.float32: torch.float16}
    return {
        key: state[key].to(half.get(state[key].dtype), copy=True).contiguous()
        for key in needed.state_dict()
    }


def evaluate(file: Path) -> dict[str, Any]:
    """Retrieval, and the pointing game with the word maps, on test scenes."""
    options = [option("model.pretrained", file), option("run.output_dir", OUTPUT / "evaluate")]
    runner, results = launch.run(EVALUATE, options, evaluate=True)
    scenes, model = runner.dataloaders["test"].dataset, runner.unwrap_dist_model(runner.model)
    return {
        "images": len(scenes.image),
        "texts": len(scenes.text),
        "retrieval": results["test"] if results else {},
        "retrieval_chance": report.retrieval_chance(scenes.img2txt),
        **pointing(model, scenes),
    }


if __name__ == "__main__":
    main()
