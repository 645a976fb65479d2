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
from lavis.common.dist_utils import get_rank, get_world_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError
from softmask_plugin.fixed_draws import seed_draws
from softmask_plugin.models.distillation import MomentumDistillation
from softmask_plugin.registry import register
from softmask_plugin.runners.bad_steps import gradient_norm
from softmask_plugin.runners.checkpoint import BEST
from softmask_plugin.runners.logs import require_finite
from softmask_plugin.runners.meter import LossMeter, loss_terms
from softmask_plugin.runners.peers import peers_needed
from softmask_plugin.runners.resumable import ResumableRunner
from softmask_plugin.runners.resume import read
from softmask_plugin.runners.run_folder import release
from softmask_plugin.runners.statistics import mask_terms, queue_statistics


@register("runner", "softmask_runner")
class SoftmaskRunner(ResumableRunner):
    """Train and evaluate a model on the task's data sets, by epochs.

    Options of ``run``: :data:`softmask_plugin.config.run_options.RUN`.

    Differences from LAVIS's ``runner_base``, on purpose: gradients of ``accum_grad_iters`` batches
    are averaged, not summed, and ``warmup_steps``, ``log_freq`` and the ``iters`` that models are
    told count optimizer steps; the first of ``valid_splits`` picks the best checkpoint;
    ``evaluate: true`` evaluates the test splits only.
    """

    def train(self) -> dict[str, Any]:
        """Train, validate and test as the configuration says.

        Returns:
            Metrics by test split, as the task gave them; None for a split without metrics, and on
            all processes but the main one where the task reports there alone.

        Raises:
            UserError: too many steps in a row had to be skipped, a checkpoint cannot be read or
                written, or another process of the job is gone.
        """
        try:
            with peers_needed():
                return self._train()
        finally:
            self.log.close()
            release(self.output_dir)

    def _train(self) -> dict[str, Any]:
        if self.evaluate_only:
            self.log_config()
            return self.evaluate(skip_reload=True)
        if isinstance(self._model, MomentumDistillation):
            self._model.paced = True
        for split in (*self.valid_splits, *self.test_splits):
            self.loader(split)  # a mistake here should not come to light after the training
        self._resume()
        with self.log.progress(self.step, self.max_epoch * self.steps_per_epoch):
            for epoch in range(self.progress.epoch, self.max_epoch):
                self.log_stats(self.train_epoch(epoch), "train")
                improved = self._validate(epoch)
                self.progress.epoch, self.progress.taken = epoch + 1, 0
                self.meter = LossMeter()
                self._save_checkpoint(epoch, is_best=improved)
        # the other processes wait here for the main one's last checkpoint, and learn of it
        best = _from_main_process(self.progress.best_epoch)
        return self.evaluate(self.max_epoch - 1 if best is None else "best")

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for what is left of an epoch.

        Returns:
            The learning rate and the means of all loss terms, over the whole epoch.
        """
        loader, progress = self.train_loader, self.progress
        self.model.train()
        done = progress.taken // loader.step_items
        end = done + loader.left(progress.taken)
        batches = loader.batches(epoch, progress.taken)
        pairs, clock = 0, time.perf_counter()
        with self.meter.watch(self._model, loss_terms, mask_terms):
            for first in range(done, end, self.accum_grad_iters):
                group = range(first, min(first + self.accum_grad_iters, end))
                self.lr_scheduler.step(cur_epoch=epoch, cur_step=first // self.accum_grad_iters)
                self._step(self._accumulate(batches, group, epoch))
                self.log.advance()
                progress.taken += len(group) * loader.step_items
                pairs += len(group) * loader.step_items
                if self.step % self.log_freq == 0 or group.stop == end:
                    means, now = self.meter.drain(), time.perf_counter()
                    self._log_training(epoch, means, pairs / (now - clock))
                    pairs, clock = 0, now
                self.panels.after(self._model, self.step, epoch_ends=group.stop == end)
                if self.save_every and self.step % self.save_every == 0 and group.stop < end:
                    self._save_checkpoint(epoch, step=self.step)
        return {"lr": self._lr, **self.meter.means()}

    def _accumulate(self, batches: Iterator[Any], group: range, epoch: int) -> list[dict[str, Any]]:
        """Add up the gradient of the mean loss over the next batches, numbered ``group``.

        Where a loss is not finite, all gradients are NaN, so that every process learns of it with
        the gradients that they exchange anyway.
        """
        taken = []
        place = {
            "epoch": epoch,
            "iters": group.start // self.accum_grad_iters,  # optimizer steps, as the schedule's
            "num_iters_per_epoch": self.steps_per_epoch,
        }
        for i in group:
            seed_draws(int(self.config.run_cfg.seed), get_rank(), epoch, i)  # of dropout and others
            samples = {**self.to_device(next(batches)), **place}
            self.panels.see(samples)
            with self._gradient_exchange(wanted=i == group[-1]):
                with self.autocast():
                    loss = self.task.train_step(model=self.model, samples=samples)
                self.meter.add("loss", loss)
                verdict = torch.where(self.meter.finite(), 1.0, math.nan)
                self.scaler.scale(loss / len(group) * verdict).backward()
            taken.append(samples)
        return taken

    def _gradient_exchange(self, wanted: bool) -> AbstractContextManager[None]:
        """Keep processes from exchanging gradients that are not complete yet."""
        if isinstance(self.model, DistributedDataParallel) and not wanted:
            return self.model.no_sync()
        return nullcontext()

    def _step(self, batches: list[dict[str, Any]]) -> None:
        """Take one optimizer step, or skip it where its numbers are not finite."""
        limit = setting(self.config.run_cfg, "clip_grad_norm")
        self.scaler.unscale_(self.optimizer)
        if limit is None:
            norm = gradient_norm(self._model)
        else:
            norm = nn.utils.clip_grad_norm_(self._model.parameters(), float(limit))
        self.step += 1
        if math.isfinite(norm.item()):  # the one place in a step that waits for the device
            self.scaler.step(self.optimizer)
            if isinstance(self._model, MomentumDistillation):
                self._model.advance()
            self.meter.add("grad_norm", norm)
            self.meter.keep()
            self.bad_steps.kept()
        else:
            self._skip(batches)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _skip(self, batches: list[dict[str, Any]]) -> None:
        if isinstance(self._model, MomentumDistillation):
            self._model.retract()
        terms = self.meter.drop()
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return  # fp16: the scaler finds a scale at which gradients do not overflow
        self.bad_steps.skipped(
            self.step, terms, batches, self._model, self.output_dir, self.config.to_dict()
        )

    @property
    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _log_training(self, epoch: int, means: dict[str, float], pairs_per_s: float) -> None:
        record = {"epoch": epoch, "step": self.step, "lr": self._lr, **means}
        temp = getattr(self._model, "temp", None)
        if isinstance(temp, Tensor):
            record["temp"] = temp.item()
        step_items = self.train_loader.step_items * self.accum_grad_iters
        entered = (self.step - self.bad_steps.total) * step_items
        record |= queue_statistics(self._model, entered)
        record["skipped_steps"] = self.bad_steps.total
        self.log.training({**record, "pairs_per_s": round(pairs_per_s, 2)})

    def evaluate(self, cur_epoch: int | str = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate the test splits: with the best checkpoint, or with the weights at hand.

        Args:
            cur_epoch: ``best`` or the epoch whose weights the model has.
            skip_reload: with ``best``, keep the model's weights as they are.

        Returns:
            Metrics by split.
        """
        with peers_needed():
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
            path = self.output_dir / f"checkpoint_{BEST}.pth"
            epoch = read(path, self._model, self.device)["epoch"]
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

    def _validate(self, epoch: int) -> bool:
        """Evaluate the validation splits.

        Returns:
            Whether this epoch is the best one so far (on the main process).
        """
        progress, improved = self.progress, False
        for i, split in enumerate(self.valid_splits):
            metrics = self.eval_epoch(split, epoch)
            if metrics is None:
                continue
            if i == 0:
                if "agg_metrics" not in metrics:
                    raise UserError(f"the task gives no 'agg_metrics' for '{split}' to choose by")
                if metrics["agg_metrics"] > progress.best_score:
                    progress.best_epoch, progress.best_score = epoch, float(metrics["agg_metrics"])
                    improved = True
            self.log_stats({**metrics, "best_epoch": progress.best_epoch}, split)
        return improved


def _from_main_process(value: Any) -> Any:
    box = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]
