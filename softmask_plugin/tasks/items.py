"""What the tasks with a result for each item share: saving the results, and metrics of them all."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask


class ItemTask(BaseTask):
    """A task whose ``valid_step`` gives a result for each item."""

    KIND = ""  # of its results, in the name of their file and in the log

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
