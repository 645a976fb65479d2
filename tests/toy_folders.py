"""Small question and statement files about images in photos/, and LAVIS's tasks on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import toy_builders
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

COLOURS = ["red", "green", "blue", "yellow"]
LABELS = ["contradiction", "neutral", "entailment"]
QUESTIONS = [
    {"image": "red.png", "question": "What colour?", "answer": "Red", "question_id": 70},
    {"image": "red.png", "question": "How many, in all?", "answer": "Two", "question_id": 8},
    {"image": "green.png", "question": "Is it green?", "answer": "yes", "question_id": 9},
    {"image": "blue.png", "question": "Who painted it?", "answer": "The painter, of course."},
]
STATEMENTS = [
    {"image": "red.png", "sentence": "It is red.", "label": "entailment"},
    {"image": "red.png", "sentence": "It is old", "label": "Neutral"},
    {"image": "green.png", "sentence": "It is blue", "label": 0},
    {"image": "blue.png", "sentence": "It is blue", "label": "2"},
]
PAIRS = [
    {"image0": "red.png", "image1": "blue.png", "sentence": "the left is red", "label": True},
    {"image0": "blue.png", "image1": "red.png", "sentence": "the left is red", "label": "false"},
    {"image0": "red.png", "image1": "red.png", "sentence": "both are red", "label": 1},
    {"image0": "red.png", "image1": "blue.png", "sentence": "both are red", "label": "0"},
]


def write(path: Path | str, rows: list | dict | str | bytes) -> Path:
    """Write rows in the format of the path's suffix, or a file's content as it is."""
    path = Path(path)
    if isinstance(rows, (str, bytes)):
        path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


SMALL = ("images=photos", *(f"vis_processor.{mode}.image_size=8" for mode in ("train", "eval")))


def settings(name: str, *options: str) -> DictConfig:
    """The default section for 8 x 8 pixels of photos/, with options."""
    return toy_builders.section(name, *SMALL, *options)


def build(name: str, *options: str) -> dict:
    return toy_builders.build(name, *SMALL, *options)


def task(name: str, dataset: str, *options: str):
    """LAVIS's own task and the data sets that it builds with our builder."""
    run = OmegaConf.create({"inference_method": "rank"})
    config = OmegaConf.create({"datasets_cfg": {dataset: settings(dataset, *options)}})
    config.run_cfg = run
    task_class = registry.get_task_class(name)
    built = task_class.setup_task(cfg=config)
    return built, built.build_datasets(config)[dataset]


def evaluate(task, dataset, model, split: str) -> dict:
    """LAVIS's own evaluation loop and metrics."""
    loader = DataLoader(dataset, 3, collate_fn=dataset.collater)
    results = task.evaluation(model, loader, cuda_enabled=False)
    return task.after_evaluation(val_result=results, split_name=split, epoch=0)
