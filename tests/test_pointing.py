"""The pointing game."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softmask_plugin.pointing import hits, own_and_other, pointing_game

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

    def test_own_and_other_things(self):
        left, right, low = (0.0, 0.0, 0.25, 0.5), (0.25, 0.0, 0.5, 0.5), (0.0, 0.5, 1.0, 1.0)
        on_left = np.array([[3.0, 1, 0, 0], [0, 0, 0, 1]])
        on_ground = np.array([[0.0, 0, 3, 0], [2, 0, 0, 0]])
        got = own_and_other(
            [
                (on_left, left, [right, low]),
                (on_left, right, [left]),
                (on_ground, right, [left]),  # equal mass, none
                (on_ground, low, [left, right]),
            ]
        )
        assert got == {
            **{"own": 0.25, "other": 0.25, "gap": 0, "chance": (1 + 1 + 1 + 4) / 8 / 4},
            **{"chosen": (1 + 0 + 0.5 + 1) / 4, "count": 4},
        }

    def test_several_boxes_count_as_one_place(self):
        maps = np.stack([np.eye(4)[:1].repeat(4, 0) * np.eye(4)[:, [row]] for row in range(3)])
        left, right = (0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.5, 1.0)
        hit, chance = hits(maps, [left, [left, right], []])
        assert hit.tolist() == [1, 1, 0] and chance.tolist() == [4 / 16, 6 / 16, 0]

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
