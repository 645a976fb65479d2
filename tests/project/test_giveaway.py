"""benchmarks.giveaway: its masks, its checkpoints, and mistakes in one line."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import giveaway
from benchmarks.giveaway import COLUMNS, Variant
from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import read_plan
from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError
from softmask_plugin.explain.gallery import wrong_caption
from softmask_plugin.explain.pairs import explain
from softmask_plugin.explain.trained import load_trained

read_once = cache(read_plan)  # it checks every run of the plan, for most of a second
PLAN = "lavis_configs/ablation/small.yaml"  # variants albef, soft_mask and deeper, seeds 0 and 1


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """An ablation's folder in which albef is pretrained with both seeds, soft_mask with seed 1.

    All have the shipped weights, but that soft_mask, seed 1, is sure that nothing matches.
    """
    monkeypatch.setattr(giveaway, "read_plan", read_once)
    folder, plan, model = tmp_path / "ablation", read_once(PLAN), load_trained().model
    section = {**OmegaConf.to_container(OmegaConf.structured(model.options)), "pretrained": None}
    finished = {("albef", 0): 0.0, ("albef", 1): 0.0, ("soft_mask", 1): 50.0}
    for (variant, seed), against in finished.items():
        weights = {**model.state_dict()}
        weights["itm_head.bias"] = weights["itm_head.bias"] + torch.tensor([against, -against])
        file = Job(plan, variant, seed, folder).place(plan.base) / f"run_{seed}" / "last.pth"
        file.parent.mkdir(parents=True)
        torch.save({"model": weights, "config": {"model": section}}, file)

    def result(job, stage):
        assert stage.name == "pretrain" and job.folder == folder
        found = (job.variant, job.seed) in finished
        return {"run": f"run_{job.seed}", "checkpoint": "last.pth"} if found else None

    monkeypatch.setattr(Job, "result", result)
    return folder


def test_no_mask_gives_a_match_of_the_bundled_model_away(capsys, tmp_path):
    """It was trained with masked negatives: under a mask it still tells right from wrong."""
    assert giveaway.main(["--scenes", "12", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "giveaway.json").read_text())["variants"]["scenes_tiny"]
    assert load_trained(None, "softmask_pretrain", "scenes_tiny").model.options.soft_mask.negatives
    scores = found["seeds"]["42"]
    assert min(scores[each] for each in COLUMNS if each.startswith("right")) > 80
    assert max(scores[each] for each in COLUMNS if each.startswith("wrong")) < 20
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| variant | right | right, soft mask | right, random patches | wrong |")
    assert row.startswith(f"| scenes_tiny | {scores['right']:.1f} | ")
    assert row.endswith(f" {scores['wrong_random_patches']:.1f} | 1 |")
    assert (tmp_path / "giveaway.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"giveaway.json", "giveaway.png"}


def by_hand(kind):
    """The six columns over two scenes, by what explain() says of a model that trains so."""
    option = [f"model.soft_mask.kind={kind}", "model.soft_mask.enabled=true"]
    trained = load_trained(None, "softmask_pretrain", "scenes_tiny", option)
    found = {"right": [], "wrong": []}
    for scene in make_scenes("test", 2):
        image = trained.image_processor(render(scene, 60))
        texts = {"right": captions(scene)[0].text, "wrong": wrong_caption(scene)}
        for caption, text in texts.items():
            found[caption] += explain(trained.model, image[None], [trained.text_processor(text)])
    plain, masked = {}, {}
    for caption, (one, other) in found.items():
        plain[caption] = 50 * (one.score + other.score)
        masked[caption] = 50 * (one.masked_scores.mean() + other.masked_scores.mean()).item()
    return plain, masked


def test_every_model_is_scored_under_both_kinds_at_full_strength():
    option = ["model.soft_mask.kind=hard", "model.soft_mask.strength=0.5"]
    trained = load_trained(None, "softmask_pretrain", "scenes_tiny", option)
    found = giveaway.measure(trained, 2)
    assert [*found] == COLUMNS
    (plain, soft), (_, random) = by_hand("soft"), by_hand("random")
    for caption in ("right", "wrong"):
        assert found[caption] == pytest.approx(plain[caption], abs=1e-4)
        assert found[f"{caption}_soft_mask"] == pytest.approx(soft[caption], abs=1e-4)
        assert found[f"{caption}_random_patches"] == pytest.approx(random[caption], abs=1e-4)
        assert abs(soft[caption] - random[caption]) > 1e-3  # the shipped one minds neither


def test_weights_with_nan_are_refused():
    trained = load_trained()
    with torch.no_grad():
        trained.model.itm_head.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        giveaway.measure(trained, 1)


def test_an_ablation_is_scored_by_variant_and_seed(ablation, tmp_path, capsys):
    asked = [str(ablation), "--plan", PLAN, "--scenes", "2", "--output", str(tmp_path / "new")]
    assert giveaway.main(asked) == 0
    content = json.loads((tmp_path / "new" / "giveaway.json").read_text())
    assert content["scenes"] == 2 and [*content["variants"]] == ["albef", "soft_mask"]
    albef, soft = content["variants"].values()
    assert albef["options"] == [] and soft["options"] == ["model.soft_mask.enabled=true"]
    expected = giveaway.measure(load_trained(), 2)
    assert albef["seeds"] == {seed: pytest.approx(expected) for seed in "01"}
    assert [*soft["seeds"]] == ["1"] and max(soft["seeds"]["1"].values()) < 1e-3
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("| albef | ") and first.endswith(") | 2 |")
    assert second.startswith("| soft_mask | 0.0 | 0.0 |") and second.endswith("| 1 |")

    assert giveaway.main([*asked, "--only", "soft_mask", "albef"]) == 0
    content = json.loads((tmp_path / "new" / "giveaway.json").read_text())
    assert [*content["variants"]] == ["soft_mask", "albef"]


MISTAKES = [
    (["{folder}/none"], r"there is no folder .*/none: give the --output-dir"),
    (["{folder}", "--only", "albf"], r"no variant 'albf': did you mean 'albef'\?"),
    (["{folder}", "--only", "albef", "deeper"], r"no pretraining of deeper is finished in /"),
    (["{empty}"], r"no pretraining of the plan 'small' is finished in /"),
    (["{folder}", "--scenes", "0"], r"--scenes is 0: it must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_deletes_nothing(
    ablation, tmp_path, capsys, monkeypatch, arguments, message
):
    (tmp_path / "empty").mkdir()
    if "{empty}" in arguments:
        monkeypatch.setattr(Job, "result", lambda job, stage: None)
    given = [each.format(folder=ablation, empty=tmp_path / "empty") for each in arguments]
    refused(given, message, tmp_path, capsys)


def test_a_stale_result_or_a_lost_checkpoint_gets_one_line(ablation, tmp_path, capsys, monkeypatch):
    (ablation / "soft_mask" / "seed_1" / "pretrain" / "run_1" / "last.pth").unlink()
    given = [str(ablation), "--only", "soft_mask"]
    refused(given, r"no checkpoint at .*/run_1/last\.pth", tmp_path, capsys)

    def result(job, stage):
        raise UserError("of another plan: start it again")

    monkeypatch.setattr(Job, "result", result)
    refused([str(ablation)], "of another plan: start it again", tmp_path, capsys)


def test_options_for_an_ablation_need_its_folder(tmp_path, capsys):
    refused([], "--plan and --only need an ablation: give its folder", tmp_path, capsys)
    assert giveaway.main([str(tmp_path), "--plan", "smal.yaml"]) == 2
    assert "--plan: there is no file 'smal.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["{tmp_path}/file", "/proc/self"])  # no folder; no new files
def test_a_bad_output_folder_is_refused_before_anything_is_scored(
    ablation, tmp_path, capsys, output
):
    (tmp_path / "file").write_text("")
    output = output.format(tmp_path=tmp_path)
    assert giveaway.main([str(ablation), "--plan", PLAN, "--output", output]) == 2
    told = capsys.readouterr()
    assert re.fullmatch(rf"giveaway: error: --output {re.escape(output)}: \[Errno.+\n", told.err)
    assert not told.out


def refused(given, message, tmp_path, capsys):
    """The command says so in one line, and leaves in its output folder what was there."""
    evidence = tmp_path / "giveaway.json"
    evidence.write_text("{}")
    assert giveaway.main([*given, "--plan", PLAN, "--output", str(tmp_path)]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("giveaway: error: ") and re.search(message, line) and not told.out
    assert evidence.read_text() == "{}" and not (tmp_path / "giveaway.png").exists()


def test_the_picture_has_a_panel_for_each_kind_of_mask():
    albef = dict(zip(COLUMNS, (80.0, 50, 60, 1, 2, 3), strict=True))
    other = {column: 10 + value for column, value in albef.items()}
    table = {"albef": Variant([], {0: albef, 1: other}), "soft_mask": Variant([], {0: albef})}
    figure = giveaway.draw(table)
    soft, random = figure.axes
    assert [label.get_text() for label in soft.get_yticklabels()] == ["albef", "soft_mask"]
    assert [axes.get_title(loc="left") for axes in (soft, random)] == [
        "under soft mask",
        "under random patches",
    ]
    for axes, (right, wrong) in ((soft, (50, 2)), (random, (60, 3))):
        ends = [[*line.get_xdata()] for line in axes.lines]  # rings and dots
        assert ends == [[right + 5, right], [85, 80], [wrong + 5, wrong], [6, 1]]
