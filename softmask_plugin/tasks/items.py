"""What the tasks with a result for each item share: saving the results, and metrics of them all."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask

from softmask_plugin.errors import UserError
from softmask_plugin.models.aligned import AlignedBase


class ItemTask(BaseTask):
    """A task whose ``valid_step`` gives a result for each item.

    Attributes:
        annotation: The items of the data set that is evaluated.
    """

    KIND = ""  # of its results, in the name of their file and in the log
    NEEDED = ("", "")  # what its data sets have, and one of them
    MODELS: ClassVar[tuple[type, ...]] = (AlignedBase,)  # that it can evaluate

    def __init__(self) -> None:
        super().__init__()
        self.annotation: list[dict[str, Any]] = []

    def before_evaluation(self, model: Any, dataset: Any, **rest: Any) -> None:
        """Keep the items of the data set that is evaluated next.

        Raises:
            UserError: The model or the data set is of another kind.
        """
        cannot = f"run.task softmask_{self.KIND} cannot evaluate"
        if not isinstance(model, self.MODELS):
            raise UserError(
                f"{cannot} {type(model).__name__}: use softmask_pretrain, softmask_retrieval or "
                "softmask_image_text_matching"
            )
        self.annotation = getattr(dataset, "annotation", None) or []
        if not self.is_suitable():
            what, example = self.NEEDED
            raise UserError(
                f"{cannot} {type(dataset).__name__}, which has no {what}: use a data set made for "
                f"it, such as {example}"
            )
        super().before_evaluation(model, dataset, **rest)

    def is_suitable(self) -> bool:
        """Whether the task can evaluate these items."""
        raise NotImplementedError

    def metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of the results of all items."""
        raise NotImplementedError

    def after_evaluation(
        self, val_result: list[dict[str, Any]], split_name: str, **_: Any
    ) -> dict[str, float] | None:
        """Merge the results of all processes; metrics on the main process, None on the others."""
        file = self.save_result(
            val_result,
            result_dir=registry.get_path("result_dir"),
            filename=f"{split_name}_{self.KIND}",
            remove_duplicate=self.inst_id_key,
        )
        if not is_main_process():
            return None
        metrics = self.metrics(json.loads(Path(file).read_text(encoding="utf-8")))
        logging.info("%s: %s", self.KIND, metrics)
        # Where LAVIS's own tasks write theirs
        file = Path(registry.get_path("output_dir"), "evaluate.txt")
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(metrics) + "\n")
        return metrics
