"""The report: metrics files, chance, the pointing game, figures and the page itself."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softmask_plugin.errors import UserError
from softmask_plugin.explain.figure import (
    HIDDEN,
    Shown,
    heat_overlay,
    soft_masked,
    word_panel,
    word_panels,
)
from softmask_plugin.explain.pairs import Explanation
from softmask_plugin.pointing import pointing_game, swapped
from softmask_plugin.report import (
    constant_guess,
    loss_curves,
    read_metrics,
    retrieval_chance,
    validation_curves,
    write_report,
)

EVIL = """<script>alert("1")</script> --> $\\frac$ for $5 & more"""


def train_record(step: int, **more: float | None) -> dict:
    values = {"loss": 3.0 / step, "loss_itc": 2.0 / step, "lr": 1e-3, "pairs_per_s": 100.0}
    return {"split": "train", "epoch": 0, "step": step, "time": step * 1.5, **values, **more}


def explanation(caption: str = "a red star", side: int = 4) -> Explanation:
    words = caption.split()
    cams = torch.rand(len(words), side, side, generator=torch.Generator().manual_seed(0))
    scores = torch.linspace(0.1, 0.9, len(words))
    return Explanation(caption, words, cams, cams, 0.95, scores, "soft", 1.0, caption)


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

    @given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=4), k=st.integers(1, 12))
    def test_equals_the_mean_over_all_draws(self, counts, k):
        ends = list(itertools.accumulate(counts))
        img2txt = {
            i: list(range(e - c, e)) for i, (c, e) in enumerate(zip(counts, ends, strict=True))
        }
        draws = list(itertools.combinations(range(ends[-1]), min(k, ends[-1])))
        hits = [bool(set(texts) & set(d)) for texts in img2txt.values() for d in draws]
        chance = retrieval_chance(img2txt, ks=(k,))
        assert chance[f"txt_r{k}"] == pytest.approx(100 * np.mean(hits))
        assert chance[f"img_r{k}"] == pytest.approx(100 * min(1, k / len(counts)))


unit = st.floats(0, 1, allow_subnormal=False)


@st.composite
def box(draw):
    x0, x1 = sorted(draw(st.lists(unit, min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(unit, min_size=2, max_size=2, unique=True)))
    return x0, y0, x1, y1


class TestPointingGame:
    LEFT_TOP = (0.0, 0.0, 0.5, 0.5)

    def test_hit_and_miss(self):
        hit = np.zeros((4, 4))
        hit[1, 0] = 3
        miss = hit.T[::-1].copy()
        assert pointing_game([(hit, self.LEFT_TOP, "shape")])["all"]["hit"] == 1
        assert pointing_game([(miss, self.LEFT_TOP, "shape")])["all"]["hit"] == 0

    def test_rows_are_y_and_columns_are_x(self):
        heat = np.zeros((2, 4))
        heat[0, 3] = 1
        assert pointing_game([(heat, (0.75, 0.0, 1.0, 0.5), "shape")])["all"] == {
            "hit": 1,
            "chance": 1 / 8,
            "energy_inside": 1,
            "area": 1 / 8,
            "count": 1,
        }

    def test_tied_peaks_share_the_hit(self):
        heat = np.zeros((4, 4))
        heat[0, 0] = heat[3, 3] = heat[3, 0] = 2
        assert pointing_game([(heat, self.LEFT_TOP, "size")])["all"]["hit"] == pytest.approx(1 / 3)

    def test_patches_on_the_edge_count_for_the_part_inside(self):
        heat = np.array([[1.0, 3.0]])
        scores = pointing_game([(heat, (0.0, 0.0, 0.75, 0.5), "size")])["all"]
        assert scores["energy_inside"] == pytest.approx((1 * 0.5 + 3 * 0.25) / 4)
        assert scores["area"] == pytest.approx(0.375)

    def test_roles(self):
        peak = np.eye(2)[:1].repeat(2, 0) * [[1], [0]]  # peak in the top left patch
        result = pointing_game(
            [(peak, self.LEFT_TOP, "shape"), (peak, (0.5, 0.5, 1.0, 1.0), "colour")]
        )
        assert {role: (row["hit"], row["count"]) for role, row in result.items()} == {
            "all": (0.5, 2),
            "shape": (1, 1),
            "colour": (0, 1),
        }

    def test_takes_tensors_and_nothing(self):
        assert pointing_game([(torch.ones(2, 2), self.LEFT_TOP, "x")])["x"]["hit"] == 0.25
        assert pointing_game([]) == {}

    def test_the_control_points_at_the_other_things(self):
        a, b, c = (0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 1.0, 1.0), (0.5, 0.0, 1.0, 0.2)
        boxes = [(1, a, "colour"), (2, a, "shape"), (5, b, "shape")]
        assert swapped(boxes) == [(1, b, "colour"), (2, b, "shape"), (5, a, "shape")]
        assert {box for word, box, _ in swapped([*boxes, (7, c, "size")]) if word == 7} == {a, b}
        assert swapped(boxes[:2]) == []

    @given(box=box(), level=st.sampled_from([0.0, 1e-30, 0.1, 7.0]), side=st.integers(1, 9))
    def test_a_constant_map_scores_chance(self, box, level, side):
        scores = pointing_game([(np.full((side, side), level), box, "size")])["all"]
        assert scores["hit"] == scores["chance"]
        assert scores["energy_inside"] == pytest.approx(scores["area"], abs=1e-12)

    @pytest.mark.parametrize(
        "heat", [np.ones(3), np.ones((0, 2)), np.array([[1, np.nan]]), np.array([[1.0, -1]])]
    )
    def test_bad_maps(self, heat):
        with pytest.raises(ValueError, match="heat map"):
            pointing_game([(heat, self.LEFT_TOP, "shape")])

    @pytest.mark.parametrize("box", [(0.5, 0, 0.5, 1), (0, 0, 1.2, 1), (0.4, 0, 0.2, 1)])
    def test_bad_boxes(self, box):
        with pytest.raises(ValueError, match="box"):
            pointing_game([(np.ones((2, 2)), box, "shape")])


class TestFigures:
    def test_a_curve_for_each_quantity_logged(self):
        records = [train_record(s, loss_soft=None) for s in (1, 2)]
        records.append(train_record(3, loss_mine=0.5))
        figure = loss_curves([*records, {"split": "val", "step": 3, "loss_val": 9.0}])
        lines = {axes.get_title("left"): axes.lines[0].get_xydata() for axes in figure.axes}
        assert list(lines) == [
            *("Total loss", "Contrast (ITC)", "Learning rate", "Pairs per second"),
            "loss_mine",
        ]
        np.testing.assert_allclose(lines["Contrast (ITC)"], [[1, 2], [2, 1], [3, 2 / 3]])
        np.testing.assert_allclose(lines["loss_mine"], [[3, 0.5]])

    def test_soft_mask_attenuates_by_its_share(self):
        picture = np.full((8, 8, 3), 0.8)
        seen = soft_masked(picture, np.array([[0.0, 1.0], [0.25, 0.0]]))
        np.testing.assert_array_equal(seen[:4, :4], picture[:4, :4])
        np.testing.assert_allclose(seen[:4, 4:], np.broadcast_to(HIDDEN, (4, 4, 3)))
        np.testing.assert_allclose(seen[4:, :4], np.broadcast_to(0.6 + 0.25 * HIDDEN, (4, 4, 3)))

    def test_heat_is_brightest_at_its_peak_whatever_its_scale(self):
        picture, heat = np.full((64, 96, 3), 0.5), np.zeros((4, 6))
        heat[1, 4] = 1e-5
        overlay = heat_overlay(picture, heat)
        y, x = np.unravel_index(overlay.sum(-1).argmax(), (64, 96))
        assert (y // 16, x // 16) == (1, 4)
        np.testing.assert_allclose(overlay, heat_overlay(picture, heat * 1e7), atol=1e-2)
        assert np.isfinite(heat_overlay(picture, np.zeros((4, 6)))).all()

    def test_word_panel(self):
        image = np.zeros((30, 20, 3), np.uint8)
        boxes = [(0, (0.0, 0.0, 0.5, 0.5), "size"), (2, (0.1, 0.2, 0.5, 0.9), "shape")]
        figure = word_panel(image, explanation(), [1, 2], boxes)
        assert len(figure.axes) == 2 + 2 * 3
        titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
        assert titles == ["match 0.95", "red", "star"]
        frames = [p for axes in figure.axes if axes.images for p in axes.patches]
        assert len(frames) == 2 * 2  # a black and a white one, on the heat map and on the mask
        for frame in frames:
            np.testing.assert_allclose(frame.get_bbox().extents, [0.1, 0.2, 0.5, 0.9])
        written = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
        assert "0.95 → 0.50" in written and "0.95 → 0.90" in written
        assert "0.95 → 0.10" not in written

    def test_word_panel_shows_the_part_of_a_caption_that_was_kept(self):
        cut = replace(explanation(), caption="a red star above a ring")
        figure = word_panel(np.zeros((30, 20, 3), np.uint8), cut, [1])
        assert "a red star […]" in [text.get_text() for text in figure.texts]

    def test_word_panel_names_the_mask_that_it_shows(self):
        image = np.zeros((30, 20, 3), np.uint8)
        for change, name in (
            ({}, "soft mask"),
            ({"kind": "random", "strength": 0.5}, "random mask\n× 0.5"),
        ):
            figure = word_panel(image, replace(explanation(), **change), [1])
            assert {"heat map", name} <= {text.get_text() for text in figure.texts}

    @pytest.mark.parametrize("width", [None, 2, 3.3])
    @pytest.mark.parametrize("shape", [(60, 60), (10, 120), (120, 10)])
    def test_a_word_panel_is_fit_to_print(self, width, shape):
        """Nothing touches or leaves the page, letters keep their size, no page is endless."""
        words = explanation("a photographer of a red star above extraordinarily black hearts")
        words = replace(words, kind="random", strength=0.5, score=1.0)
        shown = Shown(np.zeros((*shape, 3), np.uint8), words, range(4))
        figure = word_panels([shown], width=width)
        assert width is None or figure.get_figwidth() == pytest.approx(width)
        assert figure.get_figheight() < 15  # where each of four words has a row of its own
        texts = [
            *figure.texts,
            *(text for axes in figure.axes for text in (axes.title, *axes.texts)),
        ]
        texts = [text for text in texts if text.get_text()]
        assert {text.get_fontsize() for text in texts if len(text.get_text()) < 12} == {6.5, 8}
        figure.draw_without_rendering()
        boxes = {text: text.get_window_extent() for text in texts}
        for text, box in boxes.items():
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        for (one, its_box), (other, box) in itertools.combinations(boxes.items(), 2):
            assert not its_box.overlaps(box), (one, other)

    def test_a_word_panel_says_what_its_colours_and_numbers_are(self):
        figure = word_panel(np.zeros((30, 20, 3), np.uint8), explanation(), [1])
        written = [text.get_text() for text in figure.texts]
        assert {"0", "own max.", "match:\nplain → masked"} <= set(written)


class Page(HTMLParser):
    """What a browser would find in a page: tags, what they refer to, and the text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data


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
            "retrieval": {
                "itc": RECALLS | {"img_r10": 66.0},
                "itm": better,
                "chance": retrieval_chance({i: [i] for i in range(5000)}),
            },
            "pointing": pointing_game([(heat, (0.0, 0.0, 0.5, 0.5), "shape")]),
            "pointing_other": pointing_game([(heat, (0.5, 0.5, 1.0, 1.0), "shape")]),
        },
        "records": [train_record(1), train_record(2000)],
        "panels": [word_panel(np.zeros((8, 8, 3), np.uint8), explanation(EVIL), [0, 1])],
        "config": {"model": {"arch": "softmask_pretrain"}},
        "environment": {"torch": "2.13"},
    }


class TestPage:
    def test_shows_what_it_was_given(self, tmp_path, parts):
        path = write_report(tmp_path / "new" / "report.html", **parts)
        page = Page(path.read_text(encoding="utf-8"))
        words = " ".join(page.text.split())
        assert "44.5% Text finds image, R@1 chance 0.02%" in words
        assert "11.5% Image finds text, R@1 chance 0.02%" in words
        assert "100.0% Words that point at their object chance 25.0%, at another 0.0%" in words
        assert "shape 100.0 0.0 25.0 100.0 25.0 1" in words
        assert "0:50:00 Training time 2,000 steps, 100 pairs/s" in words
        assert "Contrast alone (ITC) 44.0 55.0 66.0 11.0 22.0 33.0" in words
        assert "Re-ranked by matching (ITM) 44.5 55.5 66.5 11.5 22.5 33.5" in words
        assert "500 held-out images and 1,000 captions" in words
        assert "arch: softmask_pretrain" in words
        assert page.tags.count("svg") == 2

    def test_needs_nothing_else_and_runs_nothing(self, tmp_path, parts):
        parts |= {
            "title": EVIL,
            "summary": EVIL,
            "config": {"a": EVIL},
            "environment": {EVIL: EVIL},
        }
        parts["metrics"]["retrieval"][EVIL] = parts["metrics"]["retrieval"]["itm"]
        source = write_report(tmp_path / "report.html", **parts).read_text(encoding="utf-8")
        page = Page(source)
        assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
        assert "<script" not in source.lower()
        assert page.text.count("<script>alert(") >= 6  # shown, not run
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)

    def test_figures_follow_the_page_s_theme(self, tmp_path, parts):
        svgs = write_report(tmp_path / "report.html", **parts).read_text().split("<svg")[1:]
        assert all("currentColor" in svg and "#1f2328" not in svg for svg in svgs)

    def test_leaves_out_what_it_was_not_given(self, tmp_path, parts):
        parts |= {"metrics": {}, "records": [], "panels": []}
        page = Page(write_report(tmp_path / "report.html", **parts).read_text())
        assert page.tags.count("h2") == 1 and "svg" not in page.tags and "table" not in page.tags


def test_a_constant_guess_is_right_as_often_as_the_most_frequent_truth():
    assert constant_guess(iter(["no", "yes", "no", "2"])) == 50.0
    assert constant_guess([1]) == 100.0


def test_validation_curves_are_of_what_was_evaluated_again():
    lines = [{"split": "val", "epoch": e, "step": 10 * e, "r1": 5.0 * e} for e in (1, 2)]
    lines += [train_record(3), {"split": "test", "epoch": 1, "step": 10, "r1": 9.0}]
    (axes,) = validation_curves(lines).axes
    assert axes.get_title("left") == "val: r1"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[10, 5], [20, 10]])
    assert not validation_curves(lines[1:]).axes
