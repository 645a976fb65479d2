"""The numbers behind a report: a run's log, and the scores of guessing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

from softmask_plugin.errors import UserError


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Parse ``metrics.jsonl`` of a run's folder; a last line that is only half written is left out.

    Raises:
        UserError: There is no such file, or another line is not a JSON object.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in '{run_dir}': give the folder of a run")
    lines, records = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:  # no JSON, or cut within a UTF-8 character
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not a JSON object: delete it") from error
        records.append(record)
    return records


def best_epoch(records: Iterable[Mapping[str, Any]], split: str | None) -> int | None:
    """The epoch in which a split scored best, by ``metrics.jsonl``; None if that does not say."""
    scored = [r for r in records if r.get("split") == split and "agg_metrics" in r]
    return max(scored, key=lambda record: record["agg_metrics"])["epoch"] if scored else None


def retrieval_chance(img2txt: Mapping[int, Sequence[int]]) -> dict[str, float]:
    """Recalls of a random ranking, in percent, named as in LAVIS's ``retrieval`` task.

    Args:
        img2txt: Captions of each image, as in retrieval data sets. A caption belongs to one image.

    Returns:
        ``txt_r<k>``: an image finds one of its c captions among all T in k draws without
        replacement, ``1 - C(T-c, k) / C(T, k)``, averaged over the images; ``img_r<k>``: a caption
        finds its one image among N, ``k / N``.
    """
    counts = [len(texts) for texts in img2txt.values()]
    images, texts = len(counts), sum(counts)
    chance = {}
    for k in (1, 5, 10):
        draws = min(k, texts)
        missed = sum(comb(texts - c, draws) / comb(texts, draws) for c in counts) / images
        chance[f"txt_r{k}"] = 100 * (1 - missed)
        chance[f"img_r{k}"] = 100 * min(k, images) / images
    return chance


def chance_of(dataset: Any) -> dict[str, float]:
    """Scores of guessing on an evaluation split, by the names and in the units of LAVIS's metrics:
    those of a random ranking, of the most frequent class or answer, or of tossing a coin between
    caption and foil. Empty if it is of another kind, or if a question has several answers."""
    if hasattr(dataset, "img2txt"):
        return retrieval_chance(dataset.img2txt)
    items = getattr(dataset, "annotation", ())
    if items and "foil" in items[0]:
        suffixes = dict.fromkeys(["", *(f"_{item['group']}" for item in items)])
        return {name + suffix: 50.0 for name in ("acc", "acc_itc") for suffix in suffixes}
    if hasattr(dataset, "class_labels"):
        return {"acc": constant_guess(str(item["label"]) for item in items) / 100}
    answers = [item["answer"] if hasattr(dataset, "answer_list") else {} for item in items]
    if answers and all(len(answer) == 1 for answer in answers):
        return {"agg_metrics": constant_guess(next(iter(answer)) for answer in answers)}
    return {}


def constant_guess(truths: Iterable[Any]) -> float:
    """Score of always giving the most frequent answer, in percent."""
    counts = Counter(truths)
    return 100 * counts.most_common(1)[0][1] / counts.total()
