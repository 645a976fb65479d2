"""A run that can be interrupted at any moment and goes on as if it had not been."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import is_main_process
from omegaconf import OmegaConf
from torch import nn

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError
from softmask_plugin.host.environment import note_environment
from softmask_plugin.runners import checkpoint
from softmask_plugin.runners.bad_steps import BadSteps
from softmask_plugin.runners.boards import Boards
from softmask_plugin.runners.checkpoint import CheckpointFiles
from softmask_plugin.runners.logs import RunLog
from softmask_plugin.runners.meter import LossMeter
from softmask_plugin.runners.panels import MaskPanels
from softmask_plugin.runners.portable import PortableRunner
from softmask_plugin.runners.resume import Progress, find, read
from softmask_plugin.runners.run_folder import AUTO


class ResumableRunner(PortableRunner):
    """Keeps track of a run, saves it, and finds it again.

    Checkpoints have LAVIS's names and layout, and ``progress`` besides.

    Attributes:
        step: optimizer steps since the run began, skipped ones included.
        progress: what a checkpoint holds of the run beyond weights, optimizer and scaler.
        meter: the losses of the epoch under way.
        bad_steps: those that were skipped.
        files: the checkpoints of the run's folder.
        log: metrics.jsonl, boards and progress bar.
        panels: pictures of what the soft mask hides.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        run = self.config.run_cfg
        self.step = 0  # optimizer steps since the run began, skipped ones included
        self.progress = Progress()
        self.meter = LossMeter()
        self.save_every = setting(run, "save_every_steps")
        self.bad_steps = BadSteps(limit=setting(run, "max_bad_steps"))
        self.files = CheckpointFiles(self.output_dir, setting(run, "keep_checkpoints"))
        boards = Boards(self.output_dir, self.config.to_dict())
        self.log = RunLog(self.output_dir, boards)
        self.panels = MaskPanels(
            self.output_dir / "masks", setting(run, "panel_every"), model, boards
        )
        if is_main_process():
            note_environment(self.output_dir, self.device)
            OmegaConf.save(self.config.get_config(), self.output_dir / "config.yaml")
            tokenizer: Any = getattr(model, "tokenizer", None)
            if tokenizer is not None:  # a checkpoint is of no use without its vocabulary
                tokenizer.save_vocabulary(str(self.output_dir))

    def _save_checkpoint(
        self, cur_epoch: int, is_best: bool = False, step: int | None = None
    ) -> None:
        """Save a checkpoint of a whole epoch, or with ``step`` of one under way."""
        progress = self._remember()  # all processes have a part in it
        if is_main_process():
            content = {
                "model": checkpoint.trained_state(self._model),
                "optimizer": self.optimizer.state_dict(),
                "config": self.config.to_dict(),
                "scaler": self.scaler.state_dict() or None,
                "epoch": progress.epoch - 1,  # the last whole one: LAVIS's runner goes on there
                "progress": progress.as_dict(),
            }
            self.files.save(content, cur_epoch, step, is_best)

    def _remember(self) -> Progress:
        progress = self.progress
        progress.step_items = self.train_loader.step_items
        progress.seconds = self.log.clock
        progress.skipped = self.bad_steps.total
        progress.skipped_in_a_row = self.bad_steps.in_a_row
        progress.meter = self.meter.fold()
        progress.stream = self.train_loader.state()
        progress.logs = self.log.lengths()
        return progress

    def _resume(self) -> None:
        """Go on from the checkpoint that ``run.resume_ckpt_path`` asks for, or start."""
        wanted = self.resume_ckpt_path
        if wanted == AUTO:
            found = find(self.files, self._model, self.device, self.config.to_dict())
        else:
            found = wanted and (Path(wanted), read(wanted, self._model, self.device))
        if not found:
            self.log_config()
            return
        path, content = found
        self.progress = progress = Progress.of(content)
        if wanted != AUTO and progress.epoch >= self.max_epoch:
            raise UserError(f"{path} has all {self.max_epoch} epochs done: raise run.max_epoch")
        self._restore_optimizer(path, content)
        self.bad_steps.total, self.bad_steps.in_a_row = progress.skipped, progress.skipped_in_a_row
        self.meter.restore(progress.meter)
        self.train_loader.restore(progress.stream)
        self.log.seconds = progress.seconds
        if path.parent == self.output_dir:
            self.log.cut(progress.logs)
        else:
            self.log_config()
            self._take_best_from(path.parent)
        self._find_step()
        logging.info("resumed from %s: epoch %d, step %d", path, progress.epoch, self.step)

    def _restore_optimizer(self, path: Path, content: dict[str, Any]) -> None:
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            if self.scaler.is_enabled() and content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its optimizer is of another run ({error})") from error

    def _take_best_from(self, folder: Path) -> None:
        """In a new folder: have the best checkpoint so far, or choose anew."""
        if not is_main_process() or self.progress.best_epoch is None:
            return
        if not self.files.take_best_from(folder):
            logging.warning("%s has no best checkpoint: chosen anew from here on", folder)
            self.progress.best_epoch, self.progress.best_score = None, -math.inf

    def _find_step(self) -> None:
        """Number the step, which with another number of processes is where it is in the data."""
        progress, items = self.progress, self.train_loader.step_items
        in_epoch = progress.taken // (items * self.accum_grad_iters)
        self.step = progress.epoch * self.steps_per_epoch + in_epoch
        if progress.step_items not in (0, items):
            logging.warning(
                "a batch had %d items over all processes, now %d: the run goes on at the same "
                "place in its data and schedule, not with the same numbers",
                progress.step_items,
                items,
            )
