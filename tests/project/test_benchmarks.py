"""The benchmarks in their small setting, as a reader starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import Row

ROOT = Path(__file__).parents[2]


def test_every_measurement_runs(tmp_path):
    asked = ["--small", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *asked],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) >= 10
    for row in rows.values():
        assert row["ours"] > 0 and row["other"] > 0
        assert row["name"] in done.stdout
    # A count and no time: the same on any machine.
    flops = rows["step: FLOPs per pair"]
    assert flops["ours"] < 0.72 * flops["other"]
    half = rows["half of the patches: FLOPs per pair"]
    assert half["ours"] < 0.9 * flops["ours"]  # the small image encoder is a fifth of a step
    for step in ("pretraining", "retrieval"):  # with negatives for masked images too
        flops = rows[f"BLIP {step} step: FLOPs per pair"]
        assert flops["ours"] < 0.60 * flops["other"]
    for name in ("retrieval scores: time", "BLIP retrieval scores: time"):
        assert "recalls identical" in rows[name]["note"]
    axes = {cost["axis"] for cost in content["costs"]}
    assert len(axes) == 5 and content["machine"]["threads"] == 1
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_an_unknown_measurement_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sped"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "there is no measurement 'sped'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "met"), [((1.0, 2.0, 0.5), True), ((2.0, 2.0, 0.5), False), ((1.0, 2.0, None), None)]
)
def test_a_target_is_met_or_missed(row, met):
    ours, other, target = row
    assert Row("", "s", ours, other, target).met is met
    if target is not None:  # speeds: the other way round
        assert Row("", "1/s", other, ours, 1.5, higher_is_better=True).met is (other >= 1.5 * ours)
