"""softmask_runner: trains, evaluates and logs on CPU, one GPU and several processes alike."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_main_process
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softmask_plugin.errors import UserError
from softmask_plugin.registry import register
from softmask_plugin.runners.logs import LossMeter, RunLog, require_finite
from softmask_plugin.runners.portable import PortableRunner


@register("runner", "softmask_runner")
class SoftmaskRunner(PortableRunner):
    """Train and evaluate a model on the task's data sets, by epochs.

    Options of ``run`` beyond those of LAVIS's ``runner_base``:

    - ``amp``: ``false``, ``true`` (fp16 on CUDA, bf16 on CPU), ``bf16`` or ``fp16``.
    - ``clip_grad_norm``: largest norm of the gradient; null (default) does not clip.
    - ``compile``: ``true`` compiles the image encoders with torch.compile, for GPUs (a CPU gains
      nothing); or the name of a backend of torch's. ``false`` by default.
    - ``find_unused_parameters``: as torch's DistributedDataParallel has it; false by default.

    Differences from it, on purpose: gradients of ``accum_grad_iters`` batches are averaged, not
    summed, and ``warmup_steps`` and ``log_freq`` count optimizer steps; the first of
    ``valid_splits`` picks the best checkpoint; ``evaluate: true`` evaluates the test splits only.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        self.step = 0  # optimizer steps taken since the run began
        self.best_epoch: int | None = None
        self.best_score = -math.inf
        self.log = RunLog(self.output_dir)
        if is_main_process():
            OmegaConf.save(self.config.get_config(), self.output_dir / "config.yaml")
            tokenizer: Any = getattr(model, "tokenizer", None)
            if tokenizer is not None:  # a checkpoint is of no use without its vocabulary
                tokenizer.save_vocabulary(str(self.output_dir))

    def train(self) -> dict[str, Any]:
        """Train, validate and test as the configuration says.

        Returns:
            Metrics by test split, as the task gave them; None for a split without metrics, and on
            all processes but the main one where the task reports there alone.
        """
        self.log_config()
        if self.evaluate_only:
            return self.evaluate(skip_reload=True)
        if self.resume_ckpt_path is not None:
            self._load_checkpoint(self.resume_ckpt_path)
        self.step = self.start_epoch * self.steps_per_epoch
        with self.log.progress(self.step, self.max_epoch * self.steps_per_epoch):
            for epoch in range(self.start_epoch, self.max_epoch):
                self.log_stats(self.train_epoch(epoch), "train")
                self._validate(epoch)
        # the other processes wait here for the main one's last checkpoint, and learn of it
        best = _from_main_process(self.best_epoch)
        return self.evaluate(self.max_epoch - 1 if best is None else "best")

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch; returns the learning rate and the means of all loss terms."""
        loader: Any = self.train_loader
        loader.sampler.set_epoch(epoch)
        self.model.train()
        batches, meter = iter(loader), LossMeter()
        pairs, clock = 0, time.perf_counter()
        with meter.watch(self._model):
            for first in range(0, len(loader), self.accum_grad_iters):
                group = range(first, min(first + self.accum_grad_iters, len(loader)))
                self.lr_scheduler.step(cur_epoch=epoch, cur_step=first // self.accum_grad_iters)
                self._accumulate(batches, group, epoch, meter)
                self._update()
                self.log.advance()
                pairs += len(group) * loader.batch_size * get_world_size()
                if self.step % self.log_freq == 0 or group.stop == len(loader):
                    means, now = meter.drain(), time.perf_counter()
                    self._log_training(epoch, means, pairs / (now - clock))
                    pairs, clock = 0, now
        return {"lr": self._lr, **meter.means()}

    def _accumulate(
        self, batches: Iterator[Any], group: range, epoch: int, meter: LossMeter
    ) -> None:
        """Add up the gradient of the mean loss over the next batches, numbered ``group``."""
        for i in group:
            samples = self.to_device(next(batches))
            samples.update(epoch=epoch, num_iters_per_epoch=len(self.train_loader), iters=i)
            with self._gradient_exchange(wanted=i == group[-1]):
                with self.autocast():
                    loss = self.task.train_step(model=self.model, samples=samples)
                self.scaler.scale(loss / len(group)).backward()
            meter.add("loss", loss)

    def _gradient_exchange(self, wanted: bool) -> AbstractContextManager[None]:
        """Keep processes from exchanging gradients that are not complete yet."""
        if isinstance(self.model, DistributedDataParallel) and not wanted:
            return self.model.no_sync()
        return nullcontext()

    def _update(self) -> None:
        """Take one optimizer step."""
        limit = self.config.run_cfg.get("clip_grad_norm", None)
        if limit is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), float(limit))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1

    @property
    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _log_training(self, epoch: int, means: dict[str, float], pairs_per_s: float) -> None:
        require_finite(
            means,
            f"training, epoch {epoch}, by step {self.step}",
            "lower run.init_lr, lengthen run.warmup_steps or set run.clip_grad_norm=1",
        )
        record = {"epoch": epoch, "step": self.step, "lr": self._lr, **means}
        temp = getattr(self._model, "temp", None)
        if isinstance(temp, Tensor):
            record["temp"] = temp.item()
        self.log.training({**record, "pairs_per_s": round(pairs_per_s, 2)})

    def evaluate(self, cur_epoch: int | str = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate the test splits: with the best checkpoint, or with the weights at hand.

        Args:
            cur_epoch: ``best`` or the epoch whose weights the model has.
            skip_reload: with ``best``, keep the model's weights as they are.

        Returns:
            Metrics by split.
        """
        results = super().evaluate(cur_epoch=cur_epoch, skip_reload=skip_reload) or {}
        for split, metrics in results.items():
            self.log_stats(metrics, split)
        return results

    @torch.no_grad()
    def eval_epoch(
        self, split_name: str, cur_epoch: int | str, skip_reload: bool = False
    ) -> dict[str, Any] | None:
        """Evaluate one split; arguments as in :meth:`evaluate`.

        Raises:
            UserError: a metric is not finite.
        """
        loader = self.loader(split_name)
        self.model.eval()
        epoch = cur_epoch if isinstance(cur_epoch, int) else None
        if cur_epoch == "best" and not skip_reload:
            epoch = self._load_weights(self.output_dir / "checkpoint_best.pth")["epoch"]
        self.task.before_evaluation(model=self._model, dataset=self.datasets[split_name])
        with self.autocast():
            results = self.task.evaluation(self._model, loader, **self._evaluation_options())
        if results is None:
            return None
        metrics = self.task.after_evaluation(
            val_result=results, split_name=split_name, epoch=cur_epoch
        )
        if not isinstance(metrics, dict):
            return None
        require_finite(
            metrics,
            f"'{split_name}' split, epoch {cur_epoch}",
            "the model's scores are not finite, train it anew with a lower run.init_lr",
        )
        step = None if epoch is None else (epoch + 1) * self.steps_per_epoch
        self.log.write({"split": split_name, "epoch": epoch, "step": step, **metrics})
        return metrics

    def _evaluation_options(self) -> dict[str, Any]:
        """LAVIS's tasks move batches to CUDA unless told otherwise; not all of them can be told."""
        accepted = inspect.signature(self.task.evaluation).parameters.values()
        if any(p.name == "cuda_enabled" or p.kind is p.VAR_KEYWORD for p in accepted):
            return {"cuda_enabled": self.cuda_enabled}
        return {}

    def _validate(self, epoch: int) -> None:
        """Evaluate the validation splits and save: the best epoch, or each if none has a score."""
        for i, split in enumerate(self.valid_splits):
            metrics = self.eval_epoch(split, epoch)
            if metrics is None:
                continue
            if i == 0:
                if "agg_metrics" not in metrics:
                    raise UserError(f"the task gives no 'agg_metrics' for '{split}' to choose by")
                if metrics["agg_metrics"] > self.best_score:
                    self.best_epoch, self.best_score = epoch, metrics["agg_metrics"]
                    self._save_checkpoint(epoch, is_best=True)
            self.log_stats({**metrics, "best_epoch": self.best_epoch}, split)
        if self.best_epoch is None:
            self._save_checkpoint(epoch)


def _from_main_process(value: Any) -> Any:
    box = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]
