"""LAVIS's runner without its CUDA-only parts: device, precision, optimizer and data."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import get_world_size, is_dist_avail_and_initialized
from lavis.common.registry import registry
from lavis.datasets.data_utils import apply_to_sample
from lavis.runners.runner_base import RunnerBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from softmask_plugin.config.run_options import check_values, positive, setting
from softmask_plugin.errors import UserError
from softmask_plugin.host.environment import has_bf16
from softmask_plugin.runners.loaders import TrainLoader, eval_loader, train_loader
from softmask_plugin.runners.lr_scale import scale_groups
from softmask_plugin.runners.run_folder import AUTO, claim
from softmask_plugin.runners.stop_signals import spare_workers


class PortableRunner(RunnerBase):
    """The properties of LAVIS's runner, for a CPU, one GPU or several processes alike.

    Raises:
        UserError: An option's value cannot work on this machine or with this data.
    """

    _model: nn.Module
    _wrapped_model: nn.Module | None
    _optimizer: torch.optim.Optimizer | None
    _scaler: torch.amp.GradScaler | None
    _lr_sched: Any

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        check_values(cfg.run_cfg)  # LAVIS's own scripts check nothing
        self._trained = [name for name, splits in datasets.items() if "train" in splits]
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        if self.cuda_enabled and not torch.cuda.is_available():
            raise UserError("run.device is 'cuda' but no CUDA card is usable: set run.device=cpu")
        self.amp_dtype = _amp_dtype(setting(self.config.run_cfg, "amp"), self.device)
        self.compile_backend = _compile_backend(setting(self.config.run_cfg, "compile"))

    def setup_output_dir(self) -> None:
        """Claim the run's folder; one process may run several runs in turn."""
        self.job_id: str
        resume = self.resume_ckpt_path == AUTO and not self.evaluate_only
        output_dir = Path(registry.get_path("library_root"), self.config.run_cfg.output_dir)
        self.job_id = claim(output_dir, self.job_id, resume).name
        for name in ("output_dir", "result_dir"):
            registry.mapping["paths"].pop(name, None)  # registering a name twice is an error
        super().setup_output_dir()

    @property
    def evaluate_only(self) -> bool:
        """Whether training is skipped (``run.evaluate``)."""
        return bool(setting(self.config.run_cfg, "evaluate"))

    # ---- model

    @property
    def use_distributed(self) -> bool:
        """Whether several processes train together, with any backend."""
        return is_dist_avail_and_initialized()

    @property
    def model(self) -> nn.Module:
        """The model on its device, wrapped if training is distributed."""
        if self._wrapped_model is None:
            self._wrapped_model = self._model.to(self.device)
            # In place, to keep the names of weights; not the text, whose shapes always change
            for name in ("visual_encoder", "visual_encoder_m") if self.compile_backend else ():
                if (encoder := getattr(self._model, name, None)) is not None:
                    encoder.compile(backend=self.compile_backend)
            if self.use_distributed:
                later = getattr(self._model, "first_match", 0) > 0  # ITM's parts are idle at first
                unused = later or setting(self.config.run_cfg, "find_unused_parameters")
                self._wrapped_model = DistributedDataParallel(
                    self._model,
                    device_ids=[torch.cuda.current_device()] if self.cuda_enabled else None,
                    find_unused_parameters=unused,
                )
        return self._wrapped_model

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """Gradient scaler for fp16; does nothing otherwise."""
        if self._scaler is None:
            enabled = self.amp_dtype == torch.float16
            self._scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        return self._scaler

    def autocast(self) -> torch.autocast:
        """Mixed precision as set by ``run.amp``."""
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's AdamW in its fused form: one pass over memory instead of a dozen."""
        is_new, scales = self._optimizer is None, setting(self.config.run_cfg, "lr_scale")
        optimizer: torch.optim.Optimizer = super().optimizer
        if is_new and scales:
            scale_groups(optimizer, self._model, scales)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule that ``run.lr_sched`` names, LAVIS's or ours."""
        if self._lr_sched is None:
            run = self.config.run_cfg
            self._lr_sched = registry.get_lr_scheduler_class(run.lr_sched)(
                optimizer=self.optimizer,
                max_epoch=self.max_epoch,
                iters_per_epoch=self.steps_per_epoch,
                total_steps=self.total_steps,
                min_lr=self.min_lr,
                init_lr=self.init_lr,
                decay_rate=setting(run, "lr_decay_rate"),
                warmup_start_lr=setting(run, "warmup_lr"),
                warmup_steps=setting(run, "warmup_steps"),
            )
        return self._lr_sched

    def evaluation_options(self) -> dict[str, Any]:
        """LAVIS's tasks move batches to CUDA by default, and not all of them take an argument."""
        accepted = inspect.signature(self.task.evaluation).parameters.values()
        if any(p.name == "cuda_enabled" or p.kind is p.VAR_KEYWORD for p in accepted):
            return {"cuda_enabled": self.cuda_enabled}
        return {}

    # ---- data

    def create_loaders(
        self,
        datasets: list[Any],
        num_workers: int,
        batch_sizes: list[int],
        is_trains: list[bool],
        collate_fns: list[Any],
        dataset_ratios: Any = None,
    ) -> list[DataLoader[Any] | TrainLoader]:
        """Make plain, seeded torch loaders, one per data set (LAVIS's own need CUDA)."""
        ratios = None if self.evaluate_only else _ratios(dataset_ratios, self._trained)
        # Workers are forked after tokenizers has run threads, which it would warn about
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        run = self.config.run_cfg
        shard = self.use_distributed and setting(run, "use_dist_eval_sampler")
        loaders: list[DataLoader[Any] | TrainLoader] = []
        for dataset, batch_size, is_train, collate_fn in zip(
            datasets, batch_sizes, is_trains, collate_fns, strict=True
        ):
            options = {
                "batch_size": int(batch_size),
                "num_workers": int(num_workers),
                "collate_fn": collate_fn,
                "pin_memory": self.cuda_enabled,
                "worker_init_fn": spare_workers,
            }
            # An endless stream has no other loader
            streamed = isinstance(dataset, (tuple, IterableDataset))
            if is_train and (streamed or not self.evaluate_only):
                loaders.append(train_loader(dataset, int(run.seed), ratios, **options))
            else:
                loaders.append(eval_loader(dataset, shard, **options))
        return loaders

    def loader(self, split: str) -> Any:
        """Get the loader of a split.

        Raises:
            UserError: There is no such split, or it does not fill one batch.
        """
        if split not in self.dataloaders:
            have = self.dataloaders.keys()
            without = " ".join(
                f"run.{key}=[{','.join(name for name in names if name in have)}]"
                for key in ("valid_splits", "test_splits")
                if not {*(names := getattr(self, key))} <= have
            )
            raise UserError(
                f"no data set has a '{split}' split, only {sorted(have)}: name its file in "
                f"datasets{without and f', or set {without}'}"
            )
        loader, processes = self.dataloaders[split], get_world_size()
        if len(loader) == 0:
            items = len(loader.dataset)
            most = f"set run.batch_size_train={items // processes}, or " * (items >= processes)
            raise UserError(
                f"the '{split}' split has {items} items, too few for one batch of "
                f"{loader.batch_size} in each of {processes} process(es): {most}add data"
            )
        return loader

    @property
    def train_loader(self) -> TrainLoader:
        """The loader of the train split; one pass is an epoch."""
        if "train" not in self.train_splits:
            raise UserError("run.train_splits does not name 'train': add it, or set run.evaluate")
        return self.loader("train")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, including the last one with fewer batches."""
        return math.ceil(len(self.train_loader) / self.accum_grad_iters)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: ``run.max_epoch`` or ``run.max_steps``, if less."""
        epochs, steps = (setting(self.config.run_cfg, key) for key in ("max_epoch", "max_steps"))
        if steps is None:
            return int(epochs) * self.steps_per_epoch
        return int(steps) if epochs is None else min(int(steps), int(epochs) * self.steps_per_epoch)

    @property
    def max_epoch(self) -> int:
        """Epochs of the whole run; ``run.max_steps`` may end within the last one."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def to_device(self, samples: Any) -> Any:
        """Copy a batch's tensors to the device without waiting for them."""
        return apply_to_sample(lambda tensor: tensor.to(self.device, non_blocking=True), samples)


def _ratios(given: Any, datasets: list[str]) -> list[float] | None:
    """Sampling weights of the data sets, in their order, or None."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or {*given} != {*datasets}:
        raise UserError(
            f"run.train_dataset_ratios is {given}: it must give a number to each data set that has "
            f"a 'train' split: {', '.join(datasets)}"
        )
    for name in datasets:
        positive(f"run.train_dataset_ratios.{name}", given[name])
    return [float(given[name]) for name in datasets]


def _compile_backend(compile: bool | str | None) -> str | None:
    """Backend for torch.compile; None: do not compile."""
    if not compile:
        return None
    backend = "inductor" if compile is True else compile
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise UserError(f"run.compile is '{compile}': choose true, false or one of {known}")
    return backend


def _amp_dtype(amp: bool | str, device: torch.device) -> torch.dtype | None:
    cuda, fast = device.type == "cuda", has_bf16(device)
    if amp == "auto":
        amp = "bf16" if fast else cuda
    if not amp:
        return None
    if (amp is True or amp == "fp16") and cuda:
        return torch.float16
    if amp is True or amp == "bf16":  # LAVIS means fp16 by true, which a CPU lacks
        if not fast:
            name = "card" if cuda else "CPU"
            logging.warning(
                f"run.amp={amp}: this {name} emulates bf16, many times slower: set run.amp=auto"
            )
        return torch.bfloat16
    raise UserError(
        f"run.amp is '{amp}' on {device.type}: choose auto, false, true, bf16 or (on cuda) fp16"
    )
