"""The report: metrics files, chance, curves and the page itself."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from explain.test_figure import explanation
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from softmask_plugin.errors import UserError
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.pointing import pointing_game
from softmask_plugin.report import (
    constant_guess,
    loss_curves,
    read_metrics,
    retrieval_chance,
    validation_curves,
    write_report,
)
from softmask_plugin.report.pairs import Miss

EVIL = """<script>alert("1")</script> --> $\\frac$ for $5 & more"""


def train_record(step: int, **more: float | None) -> dict:
    values = {"loss": 3.0 / step, "loss_itc": 2.0 / step, "lr": 1e-3, "pairs_per_s": 100.0}
    return {"split": "train", "epoch": 0, "step": step, "time": step * 1.5, **values, **more}


class TestReadMetrics:
    def test_reads_every_line(self, tmp_path):
        records = [train_record(1), {"split": "val", "epoch": 0, "step": 1, "img_r1": 50.0}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        assert read_metrics(tmp_path) == records

    @pytest.mark.parametrize("torn", [b'{"split": "tr', b'{"split": "\xc3', b"12"])
    def test_leaves_out_a_torn_last_line(self, tmp_path, torn):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
        assert read_metrics(tmp_path) == [{"step": 1}]

    def test_a_bad_line_before_the_last_is_named(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(UserError, match="line 2"):
            read_metrics(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match="metrics.jsonl"):
            read_metrics(tmp_path)


class TestRetrievalChance:
    def test_known_values(self):
        chance = retrieval_chance({i: [2 * i, 2 * i + 1] for i in range(500)})
        assert chance["img_r1"] == pytest.approx(100 / 500)
        assert chance["img_r10"] == pytest.approx(100 * 10 / 500)
        assert chance["txt_r1"] == pytest.approx(100 * 2 / 1000)
        missed = np.prod([(998 - j) / (1000 - j) for j in range(5)])
        assert chance["txt_r5"] == pytest.approx(100 * (1 - missed))

    @given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
    def test_equals_the_mean_over_all_draws(self, counts):
        ends = list(itertools.accumulate(counts))
        img2txt = {
            i: list(range(e - c, e)) for i, (c, e) in enumerate(zip(counts, ends, strict=True))
        }
        chance = retrieval_chance(img2txt)
        for k in (1, 5, 10):
            draws = list(itertools.combinations(range(ends[-1]), min(k, ends[-1])))
            hits = [bool(set(texts) & set(d)) for texts in img2txt.values() for d in draws]
            assert chance[f"txt_r{k}"] == pytest.approx(100 * np.mean(hits))
            assert chance[f"img_r{k}"] == pytest.approx(100 * min(1, k / len(counts)))


def test_a_curve_for_each_quantity_logged():
    records = [train_record(s, loss_soft=None) for s in (1, 2)]
    records.append(train_record(3, loss_mine=0.5))
    figures = loss_curves([*records, {"split": "val", "step": 3, "loss_val": 9.0}])
    axes = [figure.axes[0] for figure in figures]
    lines = {each.get_title("left"): each.lines[0].get_xydata() for each in axes}
    assert list(lines) == [
        *("Total loss", "Contrast (ITC)", "Learning rate", "Pairs per second"),
        "loss_mine",
    ]
    np.testing.assert_allclose(lines["Contrast (ITC)"], [[1, 2], [2, 1], [3, 2 / 3]])
    np.testing.assert_allclose(lines["loss_mine"], [[3, 0.5]])


def test_curves_of_several_runs_share_a_plot():
    first, second = ([train_record(s, loss=loss) for s in (1, 2)] for loss in (1.0, 2.0))
    (lines, *_) = (figure.axes[0].lines for figure in loss_curves(first, second))
    assert [line.get_ydata().tolist() for line in lines[::2]] == [[1, 1], [2, 2]]
    assert lines[0].get_color() != lines[2].get_color()


class Page(HTMLParser):
    """What a browser would find in a page: tags, what they refer to, the text and its words."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.text = self.title = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data
        if self.lasttag == "title" and not self.title:
            self.title = data


RECALLS = {"txt_r1": 11.0, "txt_r5": 22.0, "txt_r10": 33.0, "img_r1": 44.0, "img_r5": 55.0}


@pytest.fixture
def parts():
    heat = np.zeros((2, 2))
    heat[0, 0] = 1
    better = {key: value + 0.5 for key, value in RECALLS.items()} | {"img_r10": 66.5}
    return {
        "title": "A run",
        "metrics": {
            "images": 500,
            "texts": 1000,
            "results": {
                "ITC": RECALLS | {"img_r10": 66.0, "img_r1_chance": 0.02},
                "ITM": better | {"img_r1_chance": 0.02, "txt_r1_chance": 0.02},
            },
            "pointing": pointing_game([(heat, (0.0, 0.0, 0.5, 0.5), "shape")]),
            "pointing_other": pointing_game([(heat, (0.5, 0.5, 1.0, 1.0), "shape")]),
            "named": {"alone": {"own": 0.875, "other": 0.1, "chance": 0.111}},
        },
        "records": [train_record(1), train_record(2000)],
        "panels": [word_panels(Shown(np.zeros((8, 8, 3), np.uint8), explanation(EVIL), [0, 1]))],
        "config": {"model": {"arch": "softmask_pretrain"}},
        "environment": {"torch": "2.13"},
    }


class TestPage:
    def test_shows_what_it_was_given(self, tmp_path, parts):
        page = Page(write_report(tmp_path / "new" / "report.html", **parts))
        words = page.words
        assert "44.5% Text finds image, R@1 chance 0.02%" in words
        assert "11.5% Image finds text, R@1 chance 0.02%" in words
        assert "87.5% Maps on the named thing, alone on another one 10.0%, chance 11.1%" in words
        assert 'in phrases alone, such as "a red circle". A word hits' in words
        assert "shape 100.0 0.0 25.0 100.0 25.0 1" in words
        assert "0:50:00 Training time 2,000 steps, 100 pairs/s" in words
        table = "MetricITCITM Text finds image, R@1 44 0.02 44.5 0.02 Text finds image, R@5 55"
        assert table in words and "Image finds text, R@10 33 33.5" in words
        assert "500 held-out images and 1,000 captions" in words
        assert "arch: softmask_pretrain" in words
        assert page.tags.count("svg") == 5  # four curves and a panel

    def test_needs_nothing_else_and_runs_nothing(self, tmp_path, parts):
        parts |= {
            "title": EVIL,
            "summary": EVIL,
            "config": {"a": EVIL},
            "environment": {EVIL: EVIL},
        }
        parts["metrics"]["results"][EVIL] = {EVIL: 1.0}
        parts["misses"] = [Miss(EVIL, 2, *[Image.new("RGB", (9, 9))] * 2)]
        parts |= {"runs": {EVIL: parts["records"]}, "options": {EVIL: [EVIL]}}
        page = Page(write_report(tmp_path / "report.html", **parts))
        assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
        assert "<script" not in page.source.lower()
        assert page.text.count("<script>alert(") >= 6  # shown, not run
        assert all(re.match("data:image/(png|jpeg);base64,|#", link) for link in page.links)

    def test_figures_follow_the_page_s_theme(self, tmp_path, parts):
        svgs = write_report(tmp_path / "report.html", **parts).read_text().split("<svg")[1:]
        assert all("currentColor" in svg and "#1f2328" not in svg for svg in svgs)

    def test_a_low_accuracy_of_a_task_in_percent(self, tmp_path, parts):
        metrics = {"acc": 0.8, "acc_itc": 60.0, "acc_chance": 50.0}
        parts |= {"metrics": {"results": {"test": metrics}}}
        page = Page(write_report(tmp_path / "report.html", **parts))
        assert "0.8% Accuracy chance 50.0%" in page.words

    @pytest.mark.parametrize(("acc", "chance"), [(0.846, 1 / 3), (84.6, 100 / 3)])
    def test_accuracies_are_in_percent_whatever_the_task_counts_in(
        self, tmp_path, parts, acc, chance
    ):
        parts |= {"metrics": {"results": {"test": {"acc": acc, "acc_chance": chance}}}}
        page = Page(write_report(tmp_path / "report.html", **parts))
        assert "84.6 %" in page.words.replace("84.6%", "84.6 %")
        assert "chance 33.3%" in page.words
        assert f"{acc:.4g} {chance:.3g} " in page.words  # a table has the task's own numbers

    def test_leaves_out_what_it_was_not_given(self, tmp_path, parts):
        parts |= {"metrics": {}, "records": [], "panels": []}
        page = Page(write_report(tmp_path / "report.html", **parts))
        assert page.tags.count("h2") == 1 and "svg" not in page.tags and "table" not in page.tags


def test_a_constant_guess_is_right_as_often_as_the_most_frequent_truth():
    assert constant_guess(iter(["no", "yes", "no", "2"])) == 50.0
    assert constant_guess([1]) == 100.0


def test_validation_curves_need_two_evaluations():
    lines = [{"split": "val", "epoch": e, "step": 10 * e, "r1": 5.0 * e} for e in (1, 2)]
    lines += [train_record(3), {"split": "test", "epoch": 1, "step": 10, "r1": 9.0}]
    (figure,) = validation_curves(lines)
    (axes,) = figure.axes
    assert axes.get_title("left") == "val: r1"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[10, 5], [20, 10]])
    assert not validation_curves(lines[1:])
