"""Register a contrastive loss of your own, and choose it by name.

    python examples/custom_loss.py [--options run.max_epoch=2 ...]

Trains the tiny model on rendered scenes for 20 steps with it, and prints the loss every five.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_plugin import launch, register_loss
from softmask_plugin.report import read_metrics

YAML = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"


@register_loss("sigmoid_itc")  # then `model: {itc: {loss: sigmoid_itc}}`
class SigmoidITC(torch.nn.Module):
    """Classify each pair on its own as match or no match, as SigLIP does (arXiv 2303.15343)."""

    def __init__(self, gamma: float) -> None:  # every loss gets `itc.gamma`
        super().__init__()

    def forward(
        self, sim_i2t: Tensor, sim_t2i: Tensor, targets_i2t: Tensor, targets_t2i: Tensor
    ) -> Tensor:
        """Logits and target distributions are (B, B + queue); see FocalITCLoss."""
        both = ((sim_i2t, targets_i2t), (sim_t2i, targets_t2i))
        losses = [F.binary_cross_entropy_with_logits(sim - 10, y) for sim, y in both]
        return sum(losses) * sim_i2t.shape[1] / 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--options", nargs="*", default=[])
    options = parser.parse_args().options
    runner, _ = launch.run(
        YAML,
        [
            "model.itc.loss=sigmoid_itc",
            "datasets.scenes_pretrain.num.train=1280",
            "run.max_epoch=1",
            "run.log_freq=5",
            "run.output_dir=outputs/custom_loss",
            *options,
        ],
    )
    for record in read_metrics(runner.output_dir):
        print(f"step {record['step']}: loss_itc {record['loss_itc']:.3f}")


if __name__ == "__main__":
    main()
