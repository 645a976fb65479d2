"""softmask_runner: train, resume and evaluate on a CPU, one GPU or several processes alike."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lavis.common.dist_utils import get_rank, is_main_process
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softmask_plugin.config.run_options import setting
from softmask_plugin.datasets.task_datasets import require_evaluable
from softmask_plugin.errors import StartAgain, UserError
from softmask_plugin.files.checkpoint import BEST, open_checkpoint
from softmask_plugin.files.whole import write_whole
from softmask_plugin.host.environment import note_environment
from softmask_plugin.models.base import SoftMaskBase
from softmask_plugin.models.distillation import MomentumDistillation
from softmask_plugin.nn.fixed_draws import seed_draws
from softmask_plugin.registry import register
from softmask_plugin.runners.bad_steps import BadSteps
from softmask_plugin.runners.boards import Boards
from softmask_plugin.runners.checkpoint_files import CheckpointFiles, link, trained_state
from softmask_plugin.runners.kept_features import keep_features
from softmask_plugin.runners.logs import RunLog
from softmask_plugin.runners.lr_scale import KEY as LR_SCALE
from softmask_plugin.runners.lr_scale import apply_scales
from softmask_plugin.runners.meter import LossMeter, queue_statistics
from softmask_plugin.runners.panels import MaskPanels
from softmask_plugin.runners.peers import any_process, from_main_process, peers_needed
from softmask_plugin.runners.portable import PortableRunner
from softmask_plugin.runners.resume import (
    Progress,
    load_furthest,
    load_run,
    log_changes,
    restore_optimizer,
)
from softmask_plugin.runners.run_folder import AUTO, release
from softmask_plugin.runners.stop_signals import StopSignals, spare_workers
from softmask_plugin.vocabulary import vocabulary_of


@register("runner", "softmask_runner")
class SoftmaskRunner(PortableRunner):
    """Train a model on the task's data sets epoch by epoch, and evaluate it.

    Options of ``run``: :data:`softmask_plugin.config.run_options.RUN`. Checkpoints have LAVIS's
    names and layout, and ``progress`` besides.

    Intended differences from LAVIS's ``runner_base``: gradients of ``accum_grad_iters`` batches are
    averaged, not summed; ``warmup_steps``, ``log_freq`` and the ``iters`` that models get count
    optimizer steps; the first of ``valid_splits`` picks the best checkpoint; ``evaluate: true``
    evaluates the test splits only.

    Attributes:
        resolved_config: The run's configuration as plain values.
        step: Optimizer steps since the run began, including skipped ones.
        progress: What a checkpoint holds besides weights, optimizer and scaler.
        meter: Losses of the current epoch.
    """

    # ---- Set-up

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        run = self.config.run_cfg
        resolved: Any = OmegaConf.to_container(cfg.get_config(), resolve=True)
        self.resolved_config: dict[str, Any] = resolved
        if isinstance(model, SoftMaskBase):  # a checkpoint may have decided it
            resolved.setdefault("model", {})["sep_token"] = model.options.sep_token
        self.step = 0
        self.progress = Progress()
        self.meter = LossMeter()
        self.bad_steps = BadSteps(limit=setting(run, "max_bad_steps"))
        self.files = CheckpointFiles(self.output_dir, setting(run, "keep_checkpoints"))
        boards = Boards(self.output_dir, self.resolved_config)
        self.signals = StopSignals(self.output_dir, self.device)
        self.log = RunLog(self.output_dir, boards)
        self.panels = MaskPanels(
            self.output_dir / "masks", setting(run, "panel_every"), model, boards
        )
        if isinstance(model, MomentumDistillation):
            model.paced = True  # momentum and queues move once per optimizer step

    def _note_setup(self) -> None:
        """Write what later commands need: configuration, vocabulary, environment."""
        if is_main_process():
            note_environment(self.output_dir, self.device)
            config, tokenizer = self.config.get_config(), getattr(self._model, "tokenizer", None)
            write_whole(self.output_dir / "config.yaml", lambda path: OmegaConf.save(config, path))
            if tokenizer is not None:
                words = "\n".join([*vocabulary_of(tokenizer), ""])
                vocabulary = self.output_dir / "vocab.txt"
                write_whole(vocabulary, lambda path: path.write_text(words, "utf-8"))

    def _close(self) -> None:
        """Close the boards, finish the last checkpoint and leave the folder to other processes."""
        with ExitStack() as last_first:  # the error of a checkpoint comes after one of the boards
            last_first.callback(release, self.output_dir)
            last_first.callback(self.files.finish)
            last_first.callback(self.log.boards.close)

    # ---- Train

    def train(self) -> dict[str, Any]:
        """Train, validate and test as the configuration says.

        Returns:
            Metrics by test split as the task gave them; None for a split without metrics, and on
            other processes than the main one if the task reports only there.

        Raises:
            UserError: Too many steps in a row were skipped, a checkpoint cannot be loaded or
                written, or another process of the job is gone.
            StartAgain: A signal ended the run after a step or a validation, which it has saved.
        """
        if self.evaluate_only:
            self.log_config()
            return self.evaluate(skip_reload=True)
        try:
            with peers_needed(), self.signals.noted():
                return self._train()
        finally:
            self._close()

    def require_splits(self) -> None:
        """Raise UserError at a mistake in the splits, before training rather than after it."""
        if "train" in (*self.valid_splits, *self.test_splits):
            raise UserError(
                "run.valid_splits and run.test_splits cannot name 'train': evaluate it afterwards, "
                "with run.evaluate=true"
            )
        for split in (*self.valid_splits, *self.test_splits):
            self.loader(split)

    def _train(self) -> dict[str, Any]:
        self.require_splits()
        if "test" in self.datasets and "test" not in self.test_splits:
            logging.info("the 'test' split is not tested: add run.test_splits=[test] to do so")
        self._resume()  # first: a mistake in it must not cost the time of all features
        self._keep_features(*self.train_splits, *self.valid_splits, *self.test_splits)
        self._note_setup()
        with self.log.progress(self.step, self.total_steps):
            while not self._finished:
                epoch = self.progress.epoch
                self.log_stats(self.train_epoch(epoch), "train")
                improved = self._validate(epoch)
                self.progress.unvalidated = False
                cut = self.train_loader.left(self.progress.taken) > 0  # by run.max_steps
                if not cut:
                    self.progress.epoch, self.progress.taken = epoch + 1, 0
                    self.meter = LossMeter()
                self._save_checkpoint(epoch, improved, self.step if cut else None)
                if self.signals.agreed():
                    self._end_early()
        from_main_process(self.files.finish)  # the others wait for the main one's last checkpoint
        best = from_main_process(lambda: self.progress.best_epoch)
        return self._test(self.max_epoch - 1 if best is None else "best")

    def _keep_features(self, *splits: str) -> None:
        """Compute a frozen backbone's features of some splits, if ``run.keep_features`` asks."""
        run = self.config.run_cfg
        if not setting(run, "keep_features"):
            return
        if setting(run, "panel_every"):
            raise UserError("run.keep_features leaves no pixels to draw: remove run.panel_every")
        self.model.eval()  # and on its device
        keep_features(
            [self.loader(split).dataset for split in sorted({*splits})],
            getattr(self._model, "visual_encoder", None),
            self.autocast(),
            self.device,
            batch_size=int(run.batch_size_eval),
            num_workers=int(run.num_workers),
            worker_init_fn=spare_workers,
        )

    @property
    def _finished(self) -> bool:
        done = self.progress.epoch >= self.max_epoch or self.step >= self.total_steps
        return done and not self.progress.unvalidated

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for the rest of an epoch, or of the run.

        Returns:
            The learning rate and the means of all loss terms over the whole epoch.
        """
        loader, progress = self.train_loader, self.progress
        self.model.train()
        done = progress.taken // loader.step_items
        end = done + min(
            loader.left(progress.taken), (self.total_steps - self.step) * self.accum_grad_iters
        )
        batches = loader.batches(epoch, progress.taken)
        pairs, clock = 0, time.perf_counter()
        for first in range(done, end, self.accum_grad_iters):
            group = range(first, min(first + self.accum_grad_iters, end))
            self.train_step(batches, epoch, group)
            items, is_last = len(group) * loader.step_items, group.stop == end
            progress.taken, pairs = progress.taken + items, pairs + items
            self.log.bar.update()
            if self.step % self.log_freq == 0 or is_last:
                means, now = self.meter.drain(), time.perf_counter()
                self._log_training(epoch, means, pairs / (now - clock))
                pairs, clock = 0, now
            self.panels.after(self._model, self.step, epoch_ends=is_last)
            save_every = setting(self.config.run_cfg, "save_every_steps")
            ends = self.signals.agreed(None if is_last else self.step)
            if ends or (save_every and self.step % save_every == 0 and not is_last):
                progress.unvalidated = is_last
                self._save_checkpoint(epoch, step=self.step)
            if ends:
                self._end_early()
        return {"lr": self._lr, **self.meter.means()}

    def train_step(
        self, batches: Iterator[Any], epoch: int = 0, group: range | None = None
    ) -> None:
        """Take one optimizer step, or skip it if its numbers are not finite.

        The gradient is that of the mean loss over the group. If a loss is not finite, all gradients
        become NaN, so that every process learns of it with the gradients that they exchange anyway.

        Args:
            batches: The next batches of the training split; the model is in training mode.
            epoch: The current epoch.
            group: Numbers of the batches within the epoch; None: the first
                ``run.accum_grad_iters``.
        """
        group = range(self.accum_grad_iters) if group is None else group
        iters = group.start // self.accum_grad_iters  # counts optimizer steps, as the schedule does
        place = {"epoch": epoch, "iters": iters, "num_iters_per_epoch": self.steps_per_epoch}
        self.lr_scheduler.step(cur_epoch=epoch, cur_step=iters)
        apply_scales(self.optimizer)
        taken = []
        with self.meter.watch(self._model):
            for i in group:
                seed_draws(int(self.config.run_cfg.seed), get_rank(), epoch, i)  # e.g. of dropout
                samples = {**self.to_device(next(batches)), **place}
                self.panels.see(samples)
                with self._gradient_exchange(wanted=i == group[-1]):
                    with self.autocast():
                        loss = self.task.train_step(model=self.model, samples=samples)
                        # LAVIS after 1.0.2 returns the terms as well
                        loss = loss[0] if isinstance(loss, tuple) else loss
                    self.meter.add("loss", loss)
                    verdict = torch.where(self.meter.finite(), 1.0, math.nan)
                    self.scaler.scale(loss / len(group) * verdict).backward()
                taken.append(samples)
        self.step += 1
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if math.isfinite(norm.item()):  # the only place in a step that waits for the device
            if (limit := setting(self.config.run_cfg, "clip_grad_norm")) is not None:
                nn.utils.clip_grads_with_norm_(self._model.parameters(), limit, norm)
            self.scaler.step(self.optimizer)
            if isinstance(self._model, MomentumDistillation):
                self._model.advance()
            self.meter.add("grad_norm", norm)
            self.meter.keep()
            self.bad_steps.in_a_row = 0
        else:
            self._skip(taken)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _gradient_exchange(self, wanted: bool) -> AbstractContextManager[None]:
        """Keep processes from exchanging gradients that are still incomplete."""
        if isinstance(self.model, DistributedDataParallel) and not wanted:
            return self.model.no_sync()
        return nullcontext()

    def _skip(self, batches: list[dict[str, Any]]) -> None:
        if isinstance(self._model, MomentumDistillation):
            self._model.retract()
        terms = self.meter.drop()
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            # In fp16 a gradient may overflow until the scaler has found its scale; a loss may not
            bad_loss = not all(map(math.isfinite, terms.values()))
            if not any_process(bad_loss, self.device):
                return
        self.bad_steps.skipped(
            self.step, terms, batches, self._model, self.output_dir, self.resolved_config
        )

    @property
    def _lr(self) -> float:
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / group.get(LR_SCALE, 1.0)

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

    # ---- Checkpoints

    def _save_checkpoint(
        self, cur_epoch: int, is_best: bool = False, step: int | None = None
    ) -> None:
        """Save a checkpoint of a whole epoch or, given ``step``, of a part of one."""
        progress = self.progress
        progress.step_items = self.train_loader.step_items
        progress.seconds = self.log.clock
        progress.skipped = self.bad_steps.total
        progress.skipped_in_a_row = self.bad_steps.in_a_row
        progress.meter = self.meter.fold()  # this and the next line involve all processes
        progress.stream = self.train_loader.state()
        if is_main_process():
            progress.logs = self.log.lengths()
            content: dict[str, Any] = {
                "model": trained_state(self._model),
                "optimizer": self.optimizer.state_dict(),
                "config": self.resolved_config,
                "scaler": self.scaler.state_dict() or None,
                "epoch": progress.epoch - 1,  # the last whole one: LAVIS's runner resumes after it
                "progress": asdict(progress),
            }
            if (tokenizer := getattr(self._model, "tokenizer", None)) is not None:
                content["vocabulary"] = vocabulary_of(tokenizer)
            self.files.save(content, cur_epoch, step, is_best)

    def _end_early(self) -> NoReturn:
        """End a saved run because of a signal."""
        from_main_process(self.files.finish)
        logging.info(
            "ended after step %d by %s: the same command with run.resume_ckpt_path=auto goes on "
            "from there, as the exit code %d asks for",
            self.step,
            self.signals.caught or "a signal to another process",
            StartAgain.CODE,
        )
        raise StartAgain

    def _resume(self) -> None:
        """Resume from the checkpoint that ``run.resume_ckpt_path`` asks for, or start."""
        wanted, found = self.resume_ckpt_path, None
        if wanted == AUTO:
            found = load_furthest(self.output_dir, self._model, self.device, self.resolved_config)
        elif wanted:
            found = load_run(wanted, self._model, self.device)
        if found is None:
            self.log_config()
            return
        path = found.path
        self.progress = progress = Progress.of(found.training)
        self._find_step()
        if wanted != AUTO and self._finished:
            raise UserError(
                f"{path} has all {self.total_steps} steps done: raise run.max_epoch or, if it is "
                "set, run.max_steps"
            )
        restore_optimizer(found, self.optimizer, self.scaler)
        log_changes(found, self.resolved_config)
        self.bad_steps.total, self.bad_steps.in_a_row = progress.skipped, progress.skipped_in_a_row
        self.meter.restore(progress.meter)
        self.train_loader.restore(progress.stream)
        self.log.seconds = progress.seconds
        if path.parent == self.output_dir:
            self.log.cut(progress.logs)
            any_process(False, self.device)  # all have read the file before it gets another name
            if is_main_process():
                step = self.step if progress.taken else None  # of a part of an epoch
                self.files.continue_from(path, progress.epoch, step)
        else:
            self.log_config()
            self._take_best_from(path.parent)
        logging.info("resumed from %s: epoch %d, step %d", path, progress.epoch, self.step)

    def _take_best_from(self, folder: Path) -> None:
        """In a new folder: copy the best checkpoint so far, or forget which it was."""
        if not is_main_process() or self.progress.best_epoch is None:
            return
        best, progress = folder / BEST, self.progress
        then = Progress.of(open_checkpoint(best).training) if best.is_file() else Progress()
        if (then.best_epoch, then.best_score) == (progress.best_epoch, progress.best_score):
            write_whole(self.output_dir / BEST, lambda temporary: link(best, temporary))
        else:
            logging.warning("%s lacks the best checkpoint until then: chosen anew", folder)
            progress.best_epoch, progress.best_score = None, -math.inf

    def _find_step(self) -> None:
        """Number the step by its place in the data; the number of processes may have changed."""
        progress, items = self.progress, self.train_loader.step_items
        in_epoch = progress.taken // (items * self.accum_grad_iters)
        if not self.train_loader.left(progress.taken):  # the last step may have fewer batches
            in_epoch = self.steps_per_epoch
        self.step = progress.epoch * self.steps_per_epoch + in_epoch
        if progress.step_items not in (0, items):
            logging.warning(
                "a batch had %d items over all processes, now %d: the run resumes at the same "
                "place in its data and schedule, not with the same numbers",
                progress.step_items,
                items,
            )

    # ---- Evaluation

    def evaluate(self, cur_epoch: int | str = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate the test splits with the best checkpoint or with the model's present weights.

        Args:
            cur_epoch: ``best``, or the epoch that the model's weights come from.
            skip_reload: With ``best``, keep the model's weights.

        Returns:
            Metrics by split.
        """
        try:
            with peers_needed():
                self._keep_features(*self.test_splits)
                self._note_setup()
                return self._test(cur_epoch, skip_reload)
        finally:
            self._close()

    def _test(self, cur_epoch: int | str, skip_reload: bool = False) -> dict[str, Any]:
        results = super().evaluate(cur_epoch=cur_epoch, skip_reload=skip_reload) or {}
        for split, metrics in results.items():
            self.log_stats(metrics, split)
        return results

    @torch.no_grad()
    def eval_epoch(
        self, split_name: str, cur_epoch: int | str, skip_reload: bool = False
    ) -> dict[str, Any] | None:
        """Evaluate one split; arguments as for :meth:`evaluate`.

        Raises:
            UserError: A metric is not finite, or the data set serves training alone.
        """
        loader = self.loader(split_name)
        require_evaluable(loader.dataset, split_name)
        self.model.eval()
        epoch = cur_epoch if isinstance(cur_epoch, int) else None
        if cur_epoch == "best" and not skip_reload:
            epoch = self._load_best()
        self.task.before_evaluation(model=self._model, dataset=self.datasets[split_name])
        with self.autocast():
            results = self.task.evaluation(self._model, loader, **self.evaluation_options())
        if results is None:
            return None
        metrics = self.task.after_evaluation(
            val_result=results, split_name=split_name, epoch=cur_epoch
        )
        if not isinstance(metrics, dict):
            return None
        for name, value in metrics.items():
            if isinstance(value, (float, np.floating)) and not math.isfinite(value):
                raise UserError(
                    f"'{split_name}' split, epoch {cur_epoch}: '{name}' is {value}: the model's "
                    "scores are not finite, train it anew with a lower run.init_lr"
                )
        whole = None if epoch is None else (epoch + 1) * self.steps_per_epoch
        step = whole and min(whole, self.total_steps)
        self.log.write({"split": split_name, "epoch": epoch, "step": step, **metrics})
        return metrics

    def _load_best(self) -> int | None:
        """Load the best weights, and none of the checkpoint's other tensors for longer than that;
        returns their epoch."""
        best = load_run(self.output_dir / BEST, self._model, self.device)
        return Progress.of(best.training).best_epoch

    def _validate(self, epoch: int) -> bool:
        """Evaluate the validation splits.

        Returns:
            Whether this epoch is the best so far (on the main process).
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
