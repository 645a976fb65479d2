"""softmask ablate: the table and its arithmetic, and the plot."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
from ablations import done

from softmask_plugin.ablate import plot, table
from softmask_plugin.ablate.job import Job, last_losses
from softmask_plugin.ablate.plan import read_plan


def test_the_arithmetic_of_a_row():
    found = table.measure({0: 3.0, 1: 5.0, 2: 10.0}, {0: 2.0, 1: 6.0, 3: 50.0})
    assert found.mean == 6 and found.deviation == pytest.approx(math.sqrt(13))
    assert found.differences == {0: 1.0, 1: -1.0} and (found.difference, found.wins) == (0.0, 1)
    alone = table.measure({0: 3.0}, {})
    assert alone.deviation is None and alone.difference is None and alone.interval is None
    two = table.measure({0: 3.0, 1: 4.0}, {0: 2.0, 1: 3.0})  # alike by chance, perhaps
    assert two.difference == 1 and two.interval is None and not two.excludes_zero


def test_the_interval_of_a_difference_is_that_of_a_paired_t_test():
    own, baseline = [3.0, 5.5, 10.0, 7.0], [2.0, 6.0, 7.5, 5.0]
    found = table.measure(dict(enumerate(own)), dict(enumerate(baseline)))
    low, high = scipy.stats.ttest_rel(own, baseline).confidence_interval(0.95)
    assert (low + high) / 2 == pytest.approx(found.difference)
    assert (high - low) / 2 == pytest.approx(found.interval)
    assert not found.excludes_zero  # 1.25 +- 2.1
    for offset in (9, -9):
        moved = {seed: value + offset for seed, value in enumerate(own)}
        assert table.measure(moved, dict(enumerate(baseline))).excludes_zero


def test_last_losses_are_those_of_the_last_epoch(tmp_path):
    lines = [{"split": "train", "epoch": 0, "lr": 1, "loss_itm": 9.0}]
    lines += [{"split": "train", "epoch": 1, "lr": 1, "loss_itm": value} for value in (0.5, 0.3)]
    lines[-1]["loss_soft"] = 0.1  # a mask that began in between
    lines += [{"split": "test", "epoch": 1, "loss_itm": 7.0}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)))
    assert last_losses(tmp_path) == {"itm": pytest.approx(0.4), "soft": 0.1}
    log.write_text("")  # killed before its first line
    assert last_losses(tmp_path) == {}


def test_the_losses_in_markdown():
    losses = {"albef": {"itm": {0: 0.1, 1: 0.3}}, "soft": {"soft": {0: 0.01}}}
    assert table.range_table(losses, digits=3).splitlines() == [
        "| variant | itm | soft | seeds |",
        "|---|---|---|---|",
        "| albef | 0.200 (0.100 to 0.300) |  | 2 |",
        "| soft |  | 0.010 | 1 |",
    ]


def rows_of(**values):
    """Rows with one metric, in percent, over seeds 0, 1, ...; the first is the baseline."""
    by_name = {name: dict(enumerate(row)) for name, row in values.items()}
    first, against = next(iter(by_name.items()))
    return [
        table.Row(
            name,
            (),
            {"r1": table.measure(row, {} if name == first else against)} if row else {},
            cost=None if name == first else [1.41, 1.5, 1.62],
        )
        for name, row in by_name.items()
    ]


def test_the_table_in_markdown():
    rows = rows_of(albef=[40.0, 42.0], soft=[44.0, 43.0], late=[])
    lines = table.markdown(rows, ["r1"], "albef").splitlines()
    assert lines[0] == "| variant | r1 | seeds | time of a step |"
    assert lines[2] == "| **albef** | 41.0 ± 1.4 | 2 |  |"
    assert lines[3] == "| soft | 43.5 ± 0.7 (+2.5, 2/2) | 2 | 1.50 (1.41 to 1.62) |"
    assert lines[-1] == "Not measured yet: late."
    clear = table.markdown(rows_of(albef=[40, 42, 41], soft=[50, 52, 51.3]), ["r1"], "albef")
    assert "| soft | 51.1 ± 1.0 (**+10.1 ± 0.4**, 3/3) | 3 |" in clear
    assert "as about 0.05 of these 1 would by chance, and in how many" in clear
    assert "interval" not in "".join(lines)  # two seeds have none
    low = table.markdown(rows_of(albef=[0.5], soft=[0.61]), ["r1"], "albef")
    assert "| soft | 0.6 (+0.1, 1/1) | 1 |" in low and "In percent: mean" in low
    unknown = table.measure({0: 1.1729}, {0: 1.2}, percent=False)
    assert table.cell(unknown) == "1.173 (-0.027, 0/1)"


def test_fractions_become_percent(tmp_path):
    plan = read_plan("lavis_configs/ablation/from_scratch_tasks.yaml", seeds=1)
    done(Job(plan, "albef", 0, tmp_path), 0.731)
    albef = table.rows(plan, tmp_path, "albef")[0]
    found = {name: metric.mean for name, metric in albef.metrics.items()}
    assert found["entailment acc"] == found["nlvr acc"] == pytest.approx(73.1)
    assert found["vqa agg_metrics"] == found["tuned_retrieval txt_r1"] == 0.731  # percent already
    assert all(metric.percent for metric in albef.metrics.values())


def test_the_plot_shows_differences_with_their_intervals():
    rows = rows_of(albef=[40, 42, 41], soft=[44, 43, 42], clear=[50, 52, 51.3], late=[])
    (axes,) = plot.draw(rows, ["r1"], "albef").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["albef", "soft", "clear"]
    assert axes.get_title(loc="left") == "r1\nalbef: 41"
    soft, clear = axes.containers
    for bar, row in ((soft, rows[1]), (clear, rows[2])):
        dot, _, (line,) = bar
        assert dot.get_xdata()[0] == pytest.approx(row.metrics["r1"].difference)
        (low, _), (high, _) = line.get_segments()[0]
        assert (high - low) / 2 == pytest.approx(row.metrics["r1"].interval)
    assert soft[0].get_color() != clear[0].get_color()  # whose interval leaves out zero


def test_results_of_other_options_are_left_out_of_the_table(write_plan, tmp_path):
    plan, changed = (
        read_plan(write_plan(variants={"albef": [], "gamma": [f"model.itc.gamma={gamma}"]}))
        for gamma in (1, 2)
    )
    for seed in plan.seeds:
        done(Job(plan, "albef", seed, tmp_path), 40.0)
        done(Job(plan, "gamma", seed, tmp_path))
    albef, gamma = table.rows(plan, tmp_path, "albef")
    assert gamma.metrics["retrieval txt_r1"].difference == 10 and gamma.ran_on == [{"cores": 2}]
    albef, gamma = rows = table.rows(changed, tmp_path, "albef")
    assert albef.metrics and not gamma.metrics
    assert "Left out: " in table.markdown(rows, changed.metrics, "albef")
    assert "--only gamma --again" in table.markdown(rows, changed.metrics, "albef")
    # Without its baseline a row is still told
    _, gamma = table.rows(plan, tmp_path, "gamma")
    assert gamma.metrics["retrieval txt_r1"].difference is None
