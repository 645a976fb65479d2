"""The demo, in a small setting."""

from __future__ import annotations

import json

import pytest

from softmask_plugin import demo


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The demo with 128 scenes and one epoch, in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    options = ["datasets.scenes_pretrain.num.train=128", "run.max_epoch=1", "run.log_freq=1"]
    return demo.main(folder, options)


def test_demo_writes_report_and_metrics(small_demo):
    metrics = json.loads((small_demo.parent / "metrics.json").read_text())
    assert metrics["images"] == 500 and metrics["texts"] == 1000
    for ranking in ("chance", "itc", "itm"):
        for name in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"):
            assert 0 <= metrics["retrieval"][ranking][name] <= 100
    assert metrics["retrieval"]["chance"]["img_r1"] == pytest.approx(0.2)
    shape = metrics["pointing"]["shape"]
    assert shape["count"] == 1000 and 0 < shape["chance"] < 0.5
    for named in (metrics["named"]["in a caption"], metrics["named"]["alone"]):
        assert named["count"] == 2000
        assert named["gap"] == pytest.approx(named["own"] - named["other"])
        assert 0 < named["chance"] < 0.5 and 0 <= named["chosen"] <= 1
    page = small_demo.read_text()
    assert page.count("<svg") > demo.PANELS  # a picture per panel, and the curves


def test_demo_trains_through_the_runner(small_demo):
    (run,) = (small_demo.parent / "pretrain").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_soft", "lr", "pairs_per_s"):
        assert all(line[name] >= 0 for line in lines), name
    assert (run / "checkpoint_0.pth").is_file() and (run / "config.yaml").is_file()
