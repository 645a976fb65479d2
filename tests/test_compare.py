"""softmask compare: differences of two runs on the same items."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from softmask_plugin import cli
from softmask_plugin.compare import compare
from softmask_plugin.errors import UserError
from softmask_plugin.foil_metrics import units_of


def save(run, rows, name="test_foils.json"):
    (run / "result").mkdir(parents=True, exist_ok=True)
    (run / "result" / name).write_text(json.dumps(rows))
    (run / "result" / name.replace(".json", "_rank0.json")).write_text("[]")
    return run


def foils(itm, itc=(0.2, 0.1), images=None):
    images = range(len(itm)) if images is None else images
    return [
        {
            **{"instance_id": str(i), "image": f"{image}.jpg", "caption": f"a {i}"},
            **{"foil": f"b {i}", "group": "xy"[i % 2], "itm": list(scores), "itc": list(itc)},
        }
        for i, (scores, image) in enumerate(zip(itm, images, strict=True))
    ]


def test_means_counts_and_mcnemar_by_group(tmp_path):
    first = [(1, 0)] * 10 + [(0, 1)] * 8 + [(1, 1)] * 2
    second = [(0, 1)] * 2 + [(1, 0)] * 18
    runs = save(tmp_path / "a", foils(first)), save(tmp_path / "b", foils(second)[::-1])
    found = {each.metric: each for each in compare(*runs)}
    acc = found["acc"]
    assert (acc.items, acc.worse, acc.better) == (20, 2, 10)
    assert (acc.first, acc.second) == pytest.approx((55, 90))
    assert acc.p == pytest.approx(2 * scipy.stats.binom.cdf(2, 12, 0.5))
    assert acc.low < 35 < acc.high
    assert found["acc_x"].items == found["acc_y"].items == 10
    assert found["acc_itc"].p == 1 and found["acc_itc"].low == found["acc_itc"].high == 0
    assert found["right"].p is None and found["right"].better == 8


def test_intervals_equal_scipys_bootstrap(tmp_path):
    rng = np.random.default_rng(0)
    one, two = (rng.random(200) < share for share in (0.6, 0.7))
    rows = [[(1, 0) if right else (0, 1) for right in each] for each in (one, two)]
    runs = [save(tmp_path / name, foils(each)) for name, each in zip("ab", rows, strict=True)]
    acc = compare(*runs)[0]
    change = 100 * (two.astype(float) - one)
    theirs = scipy.stats.bootstrap((change,), np.mean, method="percentile", n_resamples=2000)
    interval = theirs.confidence_interval
    assert [acc.low, acc.high] == pytest.approx([interval.low, interval.high], abs=1.2)
    copies = [
        save(tmp_path / f"{name}4", foils(each * 4, images=[*range(200)] * 4))
        for name, each in zip("ab", rows, strict=True)
    ]
    wide = compare(*copies)[0]  # no more is known from four questions about each image
    assert [wide.low, wide.high] == pytest.approx([acc.low, acc.high])


def test_items_that_share_an_image_or_a_pair_are_one_unit():
    given = [("a", None), ("a", 1), ("b", 1), ("c", 2), ("d", None)]
    rows = [{"image": image, "pair": pair} for image, pair in given]
    units = units_of([*rows, {"index": 0}, {"index": 1}]).tolist()
    assert units[0] == units[1] == units[2] and len(set(units)) == 5
    one, other = units_of([{"image": "7", "pair": None}, {"image": "a", "pair": 7}])
    assert one != other


def test_the_best_epoch_is_compared(tmp_path):
    runs = tmp_path / "a", tmp_path / "b"
    for run in runs:
        save(run, foils([(1, 0)] * 4), "val_epoch0.json")
        save(run, foils([(0, 1)] * 4), "val_epoch1.json")
    assert compare(*runs, split="val")[0].first == 0  # the newest: no log says which was the best
    lines = [{"split": "val", "epoch": i, "agg_metrics": score} for i, score in enumerate((9, 5))]
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    acc = compare(*runs, split="val")[0]
    assert (acc.metric, acc.first, acc.second) == ("acc", 100, 0)


def test_results_of_other_tasks(tmp_path):
    def classes(*predictions):
        return [
            {"instance_id": i, "prediction": given, "target": i % 3}
            for i, given in enumerate(predictions)
        ]

    def grounding(*hits):
        return [
            {"instance_id": str(i), "text": "the cup", "acc": 0.5, "hit": hit, "other": 0.0}
            for i, hit in enumerate(hits)
        ]

    runs = [
        save(tmp_path / "a", classes(0, 1, 0, 1), "test_epochbest.json"),
        save(tmp_path / "b", classes(0, 1, 2, 0), "test_epoch3.json"),
    ]
    (acc,) = compare(*runs)
    assert (acc.metric, acc.first, acc.second, acc.worse, acc.better) == ("acc", 50, 100, 0, 2)
    runs = [
        save(tmp_path / name, grounding(*hits), "val_grounding.json")
        for name, hits in (("c", (0.5, 0, 1)), ("d", (1, 0.25, 1)))
    ]
    acc, pointing, _ = compare(*runs, split="val")
    assert pointing.metric == "pointing" and (pointing.first, pointing.second) == (50, 75)
    assert pointing.p is None and acc.p == 1  # ties share a hit


def test_phrases_are_compared_by_type(tmp_path):
    types = ["people"], ["people", "other"], []
    runs = [
        save(
            tmp_path / name,
            [
                {"instance_id": str(i), "phrase": f"a {i}", "group": group, "hit": hit, "other": 0}
                for i, (group, hit) in enumerate(zip(types, found, strict=True))
            ],
            "test_grounding.json",
        )
        for name, found in (("a", (1, 0, 1)), ("b", (1, 1, 0)))
    ]
    found = {each.metric: each for each in compare(*runs)}
    names = {"pointing", "pointing_other"}
    assert {*found} == {name + end for name in names for end in ("", "/people", "/other")}
    assert (found["pointing"].worse, found["pointing"].better) == (1, 1)
    assert (found["pointing/people"].first, found["pointing/people"].second) == (50, 100)
    assert found["pointing/other"].items == 1 and found["pointing_other"].second == 0


def test_the_command_prints_a_table(tmp_path, capsys):
    runs = [save(tmp_path / name, foils([(1, 0)] * 4)) for name in "ab"]
    assert cli.main(["compare", *map(str, runs)]) == 0
    head, acc, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["metric", "items", "first", "second"]
    assert acc.split() == "acc 4 100.00 100.00 +0.00 +0.00 to +0.00 0 0 1".split()


def test_the_command_in_a_process_of_its_own(tmp_path):
    """Nothing has imported the plugin before, without which LAVIS's import may fail."""
    runs = [save(tmp_path / name, foils([(1, 0)] * 4)) for name in "ab"]
    start = "import sys, softmask_command; sys.exit(softmask_command.main())"
    command = [sys.executable, "-c", start, "compare", *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("metric")


def test_runs_that_do_not_share_items_are_refused(tmp_path, capsys):
    rows = foils([(1, 0)] * 3)
    run = save(tmp_path / "a", rows)
    other = [{**rows[0], "caption": "a c"}, *rows[1:]]
    cases = [
        (save(tmp_path / "b", rows[:2]), "3 and 2, and only one has item 2"),
        (save(tmp_path / "c", other), "caption of item 0 is 'a 0' and 'a c'"),
        (
            save(tmp_path / "d", [{"instance_id": 0, "prediction": 1, "target": 1}]),
            "a is a run of softmask_foils, .*d one of multimodal_classification",
        ),
        (save(tmp_path / "e", [{"question_id": 0, "answer": "yes"}]), "has no results of each"),
        (save(tmp_path / "f", rows, "val_foils.json"), "has no results of each item of split 'te"),
        (tmp_path / "none", "there is no folder .*none"),
    ]
    for folder, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            compare(run, folder)
        assert "\n" not in str(caught.value)
    (run / "result" / "test_foils.json").write_text("{")
    assert cli.main(["compare", str(run), str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softmask: error: cannot read ")
