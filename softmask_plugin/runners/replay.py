"""``softmask replay FILE``: repeat the step that stopped a run, and find its bad numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.files.checkpoint import open_checkpoint
from softmask_plugin.models.distillation import MomentumDistillation
from softmask_plugin.models.weights import BoundedBy
from softmask_plugin.nn.fixed_draws import seed_draws


def replay(file: str | Path) -> list[str]:
    """Repeat the forward and backward passes of a ``bad_step_*.pth``, on the CPU in float32.

    Returns:
        Lines of text: the losses of each batch, the first module whose output is not finite, and
        the parameters whose gradients are not. UserError if the file holds no bad step, or if its
        model cannot be built here.
    """
    advice = "give the bad_step_<step>_rank<n>.pth of a run's folder"
    try:
        checkpoint = open_checkpoint(Path(file))
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error
    if checkpoint.config is None or checkpoint.training.keys() != {"batches", "step", "rank"}:
        raise UserError(f"{file} holds no bad step: {advice}")
    config: Any = OmegaConf.create(checkpoint.config)
    content = checkpoint.training
    if (vocabulary := checkpoint.path.parent / "vocab.txt").is_file():
        config.model.tokenizer = str(vocabulary)
    # The file has all weights
    config.model.update(
        load_pretrained=False, load_finetuned=False, vit_weights=None, bert_weights=None
    )
    with BoundedBy(checkpoint.path):
        model = registry.get_model_class(config.model.arch).from_config(config.model)
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise UserError(
            f"{file} does not fit its model: leave it in the run's folder, beside vocab.txt "
            f"({reason_of(error)[:200]})"
        ) from error
    if isinstance(model, MomentumDistillation):
        model.paced = True
    model.train()
    batches = content["batches"]
    lines = [f"step {content['step']}, process {content['rank']}, {len(batches)} batches"]
    for i, batch in enumerate(batches):
        number = batch["iters"] * config.run.get("accum_grad_iters", 1) + i  # within the epoch
        seed_draws(int(config.run.seed), content["rank"], batch["epoch"], number)
        with _bad_modules(model) as found:
            output = model(batch)
        output["loss"].backward()
        terms = {k: v.item() for k, v in output.items() if isinstance(v, Tensor) and v.ndim == 0}
        lines.append("losses: " + ", ".join(f"{name} {value:.4g}" for name, value in terms.items()))
        lines += [f"first output that is not finite: {name}" for name in found[:1]]
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                bad = [i for i, row in enumerate(value) if not row.isfinite().all()]
                lines += [f"input '{key}' is not finite in sample {i} of the batch" for i in bad]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad_grads = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    lines.append(f"gradients that are not finite: {len(bad_grads)} of {len(grads)} parameters")
    return lines


@contextmanager
def _bad_modules(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose outputs are not finite, in order."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        if not all(t.detach().isfinite().all() for t in tensors if isinstance(t, Tensor)):
            found.append(names[module])

    with register_module_forward_hook(hook):
        yield found
