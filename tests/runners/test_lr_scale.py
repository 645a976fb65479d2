"""Learning rates by part of the model."""

from __future__ import annotations

import logging

import pytest
import torch
from toys import ToyModel, build, read_metrics, weights

from softmask_plugin.errors import UserError
from softmask_plugin.runners.lr_scale import scale_groups


class Nested(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.text = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 3), "cross": ToyModel()})
        self.vision = torch.nn.Linear(2, 2)


def rates(model, scales):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scale_groups(optimizer, model, scales)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]
    }


def test_the_innermost_part_of_a_name_counts():
    found = rates(Nested(), {"text": 0.5, "cross": 2, "text.cross.layer": 4, "vision.bias": 0.1})
    assert found["text.layer.weight"] == 0.5
    assert found["text.cross.temp"] == 2
    assert found["text.cross.layer.weight"] == 4
    assert found["vision.weight"] == 1 and found["vision.bias"] == 0.1


def test_an_unknown_part_gets_one_line():
    with pytest.raises(UserError, match="no part 'visoin': did you mean 'vision'") as caught:
        rates(Nested(), {"visoin": 0.5})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no part 'vis'"):  # a part of a part is none
        rates(Nested(), {"vis": 0.5})


@pytest.mark.parametrize("schedule", ["softmask_cosine_lr", "linear_warmup_cosine_lr"])
def test_each_step_has_the_rate_of_a_run_at_that_rate(tmp_path, schedule):
    """What is left at the run's own rate does not depend on the factors, and the log gives it."""
    options = {"lr_sched": schedule, "weight_decay": 0.0}
    plain = build(tmp_path, job_id="plain", **options)
    scaled = build(tmp_path, job_id="scaled", lr_scale={"layer": 0.5}, **options)
    half = {key: 0.5 * plain.config.run_cfg[key] for key in ("init_lr", "min_lr", "warmup_lr")}
    slow = build(tmp_path, job_id="slow", **options, **half)
    for runner in (plain, scaled, slow):
        runner.train()
    assert torch.equal(scaled.model.temp, plain.model.temp)
    torch.testing.assert_close(scaled.model.layer.weight, slow.model.layer.weight)
    assert not torch.equal(scaled.model.temp, slow.model.temp)
    assert [line["lr"] for line in read_metrics(scaled.output_dir)] == pytest.approx(
        [line["lr"] for line in read_metrics(plain.output_dir)]
    )


def test_a_resumed_run_keeps_the_factors_of_its_yaml(tmp_path, caplog):
    options = {"max_epoch": 4, "keep_checkpoints": None}
    whole = build(tmp_path, job_id="whole", lr_scale={"layer": 0.5}, **options)
    with caplog.at_level(logging.INFO):
        whole.train()
    assert "learning rate x 0.5 for layer" in caplog.text
    file = str(whole.output_dir / "checkpoint_1.pth")
    same = build(tmp_path, job_id="same", lr_scale={"layer": 0.5}, resume_ckpt_path=file, **options)
    same.train()
    assert torch.equal(weights(same.model), weights(whole.model))
    other = build(
        tmp_path, job_id="other", lr_scale={"layer": 0.25}, resume_ckpt_path=file, **options
    )
    other.train()
    assert {group["lr_scale"] for group in other.optimizer.param_groups} == {1.0, 0.25}
    none = build(tmp_path, job_id="none", resume_ckpt_path=file, **options)
    with pytest.raises(UserError, match="its optimizer is of another run"):
        none.train()


@pytest.mark.parametrize("value", [0.5, {"layer": 0}, {"layer": "fast"}, ["layer"]])
def test_a_value_that_is_no_section_of_factors_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="run.lr_scale is .*: it must be a section of numbers"):
        build(tmp_path, lr_scale=value)
