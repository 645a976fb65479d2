"""Fixtures shared by the tests: small models with LAVIS's ALBEF beside them."""

from __future__ import annotations

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work, and registers)

# isort: split
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from ablations import small_plan
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from toy_folders import COLOURS
from toy_models import BLIP, CAPTIONS, SMALL
from toy_shards import write_shards

from benchmarks.baseline import albef_pretrain
from softmask_plugin.config.options import PretrainOptions, read_options
from softmask_plugin.datasets.shards import stream as shard_stream
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.nn import sampling


@pytest.fixture
def albef() -> dict:
    """Options that switch every innovation off."""
    return {"soft_mask": {"enabled": False}, "itc": {"gamma": 0.0}, "text": {"shared": False}}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A run's folders, as LAVIS's runner registers them."""
    (tmp_path / "result").mkdir()
    for name, folder in (("output_dir", tmp_path), ("result_dir", tmp_path / "result")):
        monkeypatch.setitem(registry.mapping["paths"], name, str(folder))
    return tmp_path


@pytest.fixture(scope="session")
def make_model():
    """Build a small softmask_pretrain: ``make_model(soft_mask={...}, itc={...}, ...)``."""

    def make(seed: int = 0, **changes) -> SoftMaskPretrain:
        torch.manual_seed(seed)
        model = SoftMaskPretrain(read_options(PretrainOptions, {**SMALL, **changes}))
        shake(model)
        return model

    return make


@pytest.fixture(scope="session")
def make_other():
    """Build a small model of any class: ``make_other(SoftMaskVqa, bert={"layers": 8}, ...)``."""

    def make(cls, seed: int = 0, **changes):
        torch.manual_seed(seed)
        known = {field.name for field in fields(cls.OPTIONS)}
        small = {key: value for key, value in SMALL.items() if key in known}
        if cls in BLIP:
            small["bert"] = {**SMALL["bert"], "fusion_layer": 0}
        model = cls(read_options(cls.OPTIONS, OmegaConf.merge(small, changes)))
        shake(model)
        return model

    return make


def shake(model: torch.nn.Module) -> None:
    """Move biases and norms off 0 and 1, which could hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if hasattr(model, "momentum"):
        model.momentum.update(0)


@pytest.fixture(scope="session")
def make_batch():
    """A batch as LAVIS's tasks give it: ``make_batch(size, image_size)``."""

    def make(size: int = 4, image_size: int = 32, **progress) -> dict:
        generator = torch.Generator().manual_seed(size)
        return {
            "image": torch.randn(size, 3, image_size, image_size, generator=generator),
            "text_input": CAPTIONS[:size],
            **{"epoch": 1, "iters": 3, "num_iters_per_epoch": 5, **progress},
        }

    return make


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def images():
    """Two of noise, of a small model's size."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def albef_twin():
    """LAVIS's AlbefPretrain of the same shape with the same weights: ``albef_twin(model)``."""
    return albef_pretrain


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of five samples with two captions each."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def same_negatives(monkeypatch):
    """LAVIS draws negatives from the global generator: let both take those at the 0.3 quantile."""

    def quantile(weights, generator=None):
        return (weights.cumsum(-1) < 0.3 * weights.sum(-1, keepdim=True)).sum(-1)

    def multinomial(weights, n):
        assert n == 1
        return quantile(weights)[..., None]

    monkeypatch.setattr(sampling, "draw_one", quantile)
    monkeypatch.setattr(torch, "multinomial", multinomial)


@pytest.fixture
def as_rank(monkeypatch):
    """Let the process pass for one of several: ``as_rank(rank, world)``."""

    def set_rank(rank: int, world: int) -> None:
        monkeypatch.setattr(shard_stream, "get_rank", lambda: rank)
        monkeypatch.setattr(shard_stream, "get_world_size", lambda: world)

    return set_rank


@pytest.fixture
def colour_photos(tmp_path, monkeypatch):
    """Four plain images in photos/ and a run's output folder; the process stands above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path / "run"))
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path / "run"))
    for name in ("photos", "run"):
        Path(name).mkdir()
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(f"photos/{colour}.png")
    return tmp_path


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Path of a YAML file for a run of two steps, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    model = {"arch": "softmask_pretrain", "model_type": "tiny", "queue_size": 8}
    data = {"scenes_retrieval": {"num": {"train": 8, "val": 4, "test": 6}}}
    run = {
        **{"task": "retrieval", "runner": "softmask_runner", "device": "cpu", "seed": 7},
        **{"lr_sched": "softmask_cosine_lr", "init_lr": 1e-3, "min_lr": 0, "weight_decay": 0.01},
        **{"output_dir": "runs", "num_workers": 0, "batch_size_train": 4, "batch_size_eval": 4},
        **{"max_epoch": 1, "train_splits": ["train"], "valid_splits": [], "test_splits": ["test"]},
        **{"k_test": 4, "use_dist_eval_sampler": False},
    }
    OmegaConf.save({"model": model, "datasets": data, "run": run}, "my.yaml")
    return "my.yaml"


@pytest.fixture
def write_plan(tmp_path):
    """Write a plan for softmask ablate: ``write_plan(seeds=[1], ...)`` returns its path."""

    def save(**changes):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(small_plan(**changes), sort_keys=False))
        return file

    return save
