"""Loading a trained model: which configuration a checkpoint goes by."""

from __future__ import annotations

from typing import Any

import torch
from toy_models import SMALL

from softmask_plugin.explain import load_trained
from softmask_plugin.files.checkpoint import open_checkpoint


def test_references_between_sections_are_resolved(make_model, tmp_path):
    """Earlier versions saved the configuration with its references."""
    model = make_model()
    reference = "${datasets.scenes_pretrain.vis_processor.eval.image_size}"
    section = {**SMALL, "arch": "softmask_pretrain", "model_type": "tiny", "image_size": reference}
    processor = {
        "eval": {"name": "softmask_image_eval", "image_size": 32, "mean": [0.1, 0.2, 0.3]},
        "train": {"name": "softmask_image_train", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    config = {
        "model": section,
        "datasets": {"scenes_pretrain": {"vis_processor": processor}},
        "run": {"seed": 1, "rerank_scoring": "itm+logit"},
    }
    file = tmp_path / "checkpoint_0.pth"
    torch.save({"model": model.state_dict(), "config": config}, file)

    assert open_checkpoint(file).config["model"]["image_size"] == 32
    loaded = load_trained(file)
    assert loaded.model.options.image_size == 32
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict())
    assert loaded.run == config["run"]  # a search ranks as the run does
    images: Any = loaded.image_processor
    assert images.mean == (0.1, 0.2, 0.3)  # of evaluation
    assert images.std == (0.5, 0.5, 0.5)  # which evaluation does not name
