"""Loading a trained model: which configuration a checkpoint goes by."""

from __future__ import annotations

import torch

from softmask_plugin.explain import load_trained
from softmask_plugin.files.checkpoint import open_checkpoint


def test_references_between_sections_are_resolved(make_model, tmp_path):
    """Earlier versions saved the configuration with its references."""
    model = make_model()
    section = {
        "arch": "softmask_pretrain",
        "model_type": "tiny",
        "tokenizer": "scenes",
        "image_size": "${datasets.scenes_pretrain.vis_processor.eval.image_size}",
        "vit": {"patch_size": 8, "width": 48, "depth": 2, "heads": 3},
        "bert": {
            "vocab_size": None,
            "width": 32,
            "layers": 5,
            "heads": 4,
            "intermediate": 64,
            "fusion_layer": 2,
            "max_positions": 40,
        },
        "embed_dim": 16,
        "queue_size": 24,
    }
    processor = {"eval": {"name": "softmask_image_eval", "image_size": 32}}
    config = {
        "model": section,
        "datasets": {"scenes_pretrain": {"vis_processor": processor}},
        "run": {"seed": 1},
    }
    file = tmp_path / "checkpoint_0.pth"
    torch.save({"model": model.state_dict(), "config": config}, file)

    assert open_checkpoint(file).config["model"]["image_size"] == 32
    loaded = load_trained(file).model
    assert loaded.options.image_size == 32
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
