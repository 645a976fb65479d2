"""Checkpoints are written beside the training, from a copy."""

from __future__ import annotations

import threading

import pytest
import torch

from softmask_plugin.errors import UserError
from softmask_plugin.runners.checkpoint_files import CheckpointFiles


@pytest.fixture
def slow(monkeypatch):
    """torch.save waits for this event."""
    event, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *given: event.wait(30) and save(*given))
    return event


def test_a_step_waits_for_the_copy_alone(tmp_path, slow):
    files, weight = CheckpointFiles(tmp_path, keep=None), torch.zeros(3)
    files.save({"model": {"weight": weight}}, 0, None, is_best=True)
    weight += 1
    assert not list(tmp_path.glob("*.pth"))
    slow.set()
    files.save({"model": {"weight": weight}}, 1, None, is_best=False)  # waits for the first
    assert (tmp_path / "checkpoint_0.pth").is_file()
    files.finish()
    found = [torch.load(tmp_path / f"checkpoint_{n}.pth") for n in (0, 1, "best")]
    assert [each["model"]["weight"].tolist() for each in found] == [[0] * 3, [1] * 3, [0] * 3]


def test_tied_weights_stay_tied(tmp_path):
    files, weight = CheckpointFiles(tmp_path, keep=None), torch.rand(50, 4).t()
    state = {"words": weight, "decoder": weight.detach(), "other": weight.clone()}
    files.save(
        {"model": state, "optimizer": {"betas": (0.9, 0.99), "state": [weight]}}, 0, 5, False
    )
    files.finish()
    found = torch.load(tmp_path / "checkpoint_0_5.pth")
    words, decoder, other = found["model"].values()
    assert words.data_ptr() == decoder.data_ptr() == found["optimizer"]["state"][0].data_ptr()
    assert other.data_ptr() != words.data_ptr()
    assert torch.equal(words, weight) and words.stride() == weight.stride()
    assert found["optimizer"]["betas"] == (0.9, 0.99)


def test_an_error_while_writing_is_raised_by_the_next_one_and_at_the_end(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no room left")

    files = CheckpointFiles(tmp_path, keep=None)
    monkeypatch.setattr(torch, "save", fail)
    files.save({"model": {}}, 0, None, is_best=False)
    for call in (lambda: files.save({"model": {}}, 1, None, False), files.finish):
        with pytest.raises(UserError, match=r"cannot save .*checkpoint_0.pth \(no room left\)"):
            call()
    assert not list(tmp_path.iterdir())
