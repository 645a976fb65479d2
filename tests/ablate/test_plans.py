"""softmask ablate: plans and their mistakes."""

from __future__ import annotations

import pytest
from ablations import EVALUATE, SMALL

from softmask_plugin import cli
from softmask_plugin.ablate.plan import read_plan
from softmask_plugin.errors import UserError

STAGE = {"name": "a", "config": EVALUATE, "metrics": ["txt_r1"]}


def test_a_plan_gives_the_options_of_each_run(write_plan):
    deep = ["model.bert.layers=6", "model.vit.patch_dropout=0.5", "model.itc.gamma=1"]
    variants = {"albef": [], "deep": deep}
    given = ["run.num_workers=0", "datasets.scenes_retrieval.objects=1"]
    plan = read_plan(write_plan(variants=variants, seeds=[3, 5, 7]), given, seeds=2)
    assert plan.name == "mine" and plan.seeds == (3, 5)
    assert plan.metrics == ["retrieval txt_r1", "retrieval img_r1"]
    pretrain, retrieval = plan.stages
    assert pretrain.train and not retrieval.train and retrieval.pretrained
    assert plan.options("deep", pretrain) == [*pretrain.options, *variants["deep"]]
    assert pretrain.options[-1] == given[0] and retrieval.options[-2:] == (*given,)
    # Other stages must have the model's shape, and nothing else of the pretraining's
    shape = ["model.bert.image_cls=true", "model.vit.depth=3", "model.bert.layers=6"]
    assert plan.options("deep", retrieval) == [*retrieval.options, *shape]


def test_variants_fork_from_a_trunk(write_plan):
    trunk = ["run.max_epoch=4"]  # its budget is its own
    plan = read_plan(
        write_plan(variants={"albef": [], "gamma": ["model.itc.gamma=1"]}, trunk=trunk)
    )
    assert plan.options("trunk", plan.trunk) == [*plan.base.options, *trunk]
    assert plan.asked["trunk", "trunk"]["run.max_epoch"] == 4 and plan.trunk not in plan.stages
    assert plan.base.pretrained and not plan.trunk.pretrained
    assert not read_plan(write_plan()).base.pretrained


def test_variants_may_train_longer_if_the_plan_says_so(write_plan):
    variants = {"albef": [], "longer": ["run.max_epoch=9"]}
    plan = read_plan(write_plan(variants=variants, equal_budget=False))
    assert plan.asked["longer", "pretrain"]["run.max_epoch"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": [], "variants": {"albef": [], "trunk": []}}, "variants: rename 'trunk'"),
        ({"trunk": ["model.itc.gama=1"]}, "variant 'trunk', stage 'trunk': "),
        ({"sedes": [1]}, "unknown key plan.sedes: did you mean 'seeds'"),
        ({"base": {}}, "base has no 'config'"),
        ({"base": {"config": "nowhere.yaml"}}, "there is no file 'nowhere.yaml'"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]: list each once"),
        ({"seeds": 3}, "seeds is 3: it must be a list"),
        ({"seeds": [-1]}, "seeds is -1: it must be a whole number in [0, 4294967295]"),
        ({"baseline": "albf"}, "did you mean 'albef'"),
        ({"variants": []}, "variants is []: it must be a section"),
        ({"variants": {"albef": None}}, "variants.albef is None"),
        ({"variants": {"albef": [], "a/b": []}}, "'a/b' cannot name a folder"),
        ({"variants": {"albef": [], "b": ["run.max_epoch=9"]}}, "variants.b has another budget"),
        (
            {"variants": {"albef": [], "b": ["datasets.scenes_pretrain={num: {train: 9}}"]}},
            "datasets.scenes_pretrain.num.train is 9 instead of 16",
        ),
        ({"variants": {"albef": ["run.seed=3"]}}, "variants.albef: remove 'run.seed=3', which"),
        (
            {"base": {"config": EVALUATE, "options": ["run.output_dir=x"]}},
            "base.options: remove 'run.output_dir=x'",
        ),
        ({"evaluate": []}, "evaluate is empty"),
        ({"evaluate": [{**STAGE, "metrics": []}]}, "metrics is empty"),
        ({"variants": {"albef": ["model.itc.gama=1"]}}, "did you mean 'gamma'"),
        ({"variants": {"albef": ["model.soft_mask.layer=3"]}}, "stage 'pretrain'"),
        ({"variants": {"albef": ["run.runner=runner_base"]}}, "softmask_runner"),
        ({"evaluate": [{"name": "a", "config": EVALUATE}]}, "has no 'metrics'"),
        ({"evaluate": [{**STAGE, "metrics": ["r1"]}]}, "metric 'r1'"),
        ({"evaluate": [STAGE] * 2}, "two stages are called 'a'"),
        ({"evaluate": [{"name": "a", "confg": EVALUATE}]}, "did you mean 'config'"),
        (
            {"evaluate": [{**STAGE, "options": ["run.test_splits=[val,test]"]}]},
            "run.test_splits is ['val', 'test']: name the one to measure",
        ),
        (
            {"evaluate": [{**STAGE, "pretrained": False}]},
            "stage 'a': there are no weights to evaluate",
        ),
        ({"evaluate": [{**STAGE, "train": 1}]}, "it must be true or false"),
    ],
)
def test_a_mistake_in_a_plan_gets_one_line(write_plan, changes, message):
    file = write_plan(**changes)
    with pytest.raises(UserError) as caught:
        read_plan(file)
    assert message in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variant_named_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("variants:\n  a: []\n  a: []\n")
    with pytest.raises(UserError, match="not valid YAML.*duplicate key a"):
        read_plan(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "lavis_configs/ablation/scene.yaml"], "did you mean"),
        (["--plan", SMALL, "--only", "soft_msk"], "did you mean 'soft_mask'"),
        (["--plan", SMALL, "--baseline", "all"], "--baseline: the plan has no variant 'all'"),
        (
            ["--plan", SMALL, "--options", "datasets.scenes_pretrian.seed=1"],
            "did you mean 'scenes_pretrain'",
        ),
        (["--plan", SMALL, "--options", "run.seed=9"], "--options: remove 'run.seed=9'"),
        (["--plan", SMALL, "--seeds", "9"], "the plan has 2 seeds"),
        (["--plan", SMALL, "--jobs", "0"], "--jobs is 0"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line(arguments, message, capsys, tmp_path):
    assert cli.main(["ablate", *arguments, "--output-dir", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith("softmask: error: ") and message in error


@pytest.mark.parametrize("metric", ["acc", "acc_itc", "right", "wrong_swap", "acc_interval_size"])
def test_foil_metrics_can_be_measured_by_group(write_plan, metric):
    stage = {"name": "foils", "config": "lavis_configs/projects/scenes/eval/foils_tiny.yaml"}
    assert read_plan(write_plan(evaluate=[{**stage, "metrics": [metric]}]))
    with pytest.raises(UserError, match=f"unknown metric 'x{metric}'"):
        read_plan(write_plan(evaluate=[{**stage, "metrics": [f"x{metric}"]}]))


def test_grounding_metrics_can_be_measured_by_group(write_plan):
    stage = {
        "name": "grounding",
        "config": "lavis_configs/projects/scenes/eval/grounding_tiny.yaml",
    }
    metrics = ["acc_testA", "pointing_chance", "pointing_gap/people"]
    assert read_plan(write_plan(evaluate=[{**stage, "metrics": metrics}]))
    with pytest.raises(UserError, match="unknown metric 'accu_testA'"):
        read_plan(write_plan(evaluate=[{**stage, "metrics": ["accu_testA"]}]))
