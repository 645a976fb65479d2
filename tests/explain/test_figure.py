"""Word panels: heat maps, masks and what is written on them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from softmask_plugin.explain.figure import HIDDEN, Shown, heat_overlay, soft_masked, word_panels
from softmask_plugin.explain.pairs import Explanation


def explanation(caption: str = "a red star", side: int = 4) -> Explanation:
    words = caption.split()
    cams = torch.rand(len(words), side, side, generator=torch.Generator().manual_seed(0))
    scores = torch.linspace(0.1, 0.9, len(words))
    return Explanation(caption, words, cams, cams, 0.95, scores, "soft", 1.0, caption)


def test_soft_mask_attenuates_by_its_share():
    picture = np.full((8, 8, 3), 0.8)
    seen = soft_masked(picture, np.array([[0.0, 1.0], [0.25, 0.0]]))
    np.testing.assert_array_equal(seen[:4, :4], picture[:4, :4])
    np.testing.assert_allclose(seen[:4, 4:], np.broadcast_to(HIDDEN, (4, 4, 3)))
    np.testing.assert_allclose(seen[4:, :4], np.broadcast_to(0.6 + 0.25 * HIDDEN, (4, 4, 3)))


def test_heat_is_brightest_at_its_peak_whatever_its_scale():
    picture, heat = np.full((64, 96, 3), 0.5), np.zeros((4, 6))
    heat[1, 4] = 1e-5
    overlay = heat_overlay(picture, heat)
    y, x = np.unravel_index(overlay.sum(-1).argmax(), (64, 96))
    assert (y // 16, x // 16) == (1, 4)
    np.testing.assert_allclose(overlay, heat_overlay(picture, heat * 1e7), atol=1e-2)
    assert np.isfinite(heat_overlay(picture, np.zeros((4, 6)))).all()


def test_word_panel():
    image = np.zeros((30, 20, 3), np.uint8)
    boxes = [(0, (0.0, 0.0, 0.5, 0.5), "size"), (2, (0.1, 0.2, 0.5, 0.9), "shape")]
    figure = word_panels(Shown(image, explanation(), [1, 2], boxes))
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


def test_word_panel_shows_the_part_of_a_caption_that_was_kept():
    cut = replace(explanation(), caption="a red star above a ring")
    figure = word_panels(Shown(np.zeros((30, 20, 3), np.uint8), cut, [1]))
    assert "a red star […]" in [text.get_text() for text in figure.texts]


def test_word_panel_names_the_mask_that_it_shows():
    image = np.zeros((30, 20, 3), np.uint8)
    for change, name in (
        ({}, "soft mask"),
        ({"kind": "random", "strength": 0.5}, "random mask\n× 0.5"),
    ):
        figure = word_panels(Shown(image, replace(explanation(), **change), [1]))
        assert {"heat map", name} <= {text.get_text() for text in figure.texts}


@pytest.mark.parametrize("width", [None, 2, 3.3])
@pytest.mark.parametrize("shape", [(60, 60), (10, 120), (120, 10)])
def test_a_word_panel_is_fit_to_print(width, shape):
    """Nothing touches or leaves the page, letters keep their size, no page is endless."""
    words = explanation("a photographer of a red star above extraordinarily black hearts")
    words = replace(words, kind="random", strength=0.5, score=1.0)
    shown = Shown(np.zeros((*shape, 3), np.uint8), words, range(4))
    figure = word_panels(shown, width=width)
    assert width is None or figure.get_figwidth() == pytest.approx(width)
    assert figure.get_figheight() < 15  # where each of four words has a row of its own
    texts = [*figure.texts, *(text for axes in figure.axes for text in (axes.title, *axes.texts))]
    texts = [text for text in texts if text.get_text()]
    assert {text.get_fontsize() for text in texts if len(text.get_text()) < 12} == {6.5, 8}
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, its_box), (other, box) in itertools.combinations(boxes.items(), 2):
        assert not its_box.overlaps(box), (one, other)


def test_a_word_panel_says_what_its_colours_and_numbers_are():
    figure = word_panels(Shown(np.zeros((30, 20, 3), np.uint8), explanation(), [1]))
    written = [text.get_text() for text in figure.texts]
    assert {"0", "own max.", "match:\nplain → masked"} <= set(written)
