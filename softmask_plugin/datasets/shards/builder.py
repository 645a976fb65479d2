"""Images and captions in WebDataset shards, streamed: for data that no folder holds."""

from __future__ import annotations

import logging

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder, load_dataset_config

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import check_keys
from softmask_plugin.datasets.shards.files import count_samples, find_shards
from softmask_plugin.datasets.shards.stream import ShardStream
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError
from softmask_plugin.registry import register


@register("builder", "caption_shards")
class CaptionShardsBuilder(BaseDatasetBuilder):
    """Builds ``train``, a stream; relative paths start from the current folder.

    Raises:
        UserError: a key is unknown or has a wrong value, shards are missing, or nothing says how
            many samples they hold.
    """

    NAME = "caption_shards"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/caption_shards/default.yaml")}
    train_dataset_cls = ShardStream

    def _download_data(self) -> None:
        """Nothing to download."""

    def build(self) -> dict[str, ShardStream]:
        """Build the stream."""
        place, config = f"datasets.{self.NAME}", self.config
        check_keys(place, config, ["type", *load_dataset_config(self.default_config_path())])
        shards = find_shards(config.get("shards") or [], f"{place}.shards")
        items = config.get("items")
        if items is None:
            items = count_samples(shards, f"{place}.items")
        for key, value, least in (
            ("items", items, 1),
            ("shuffle", config.shuffle, 0),
            ("seed", config.seed, 0),
        ):
            if type(value) is not int or value < least:
                raise UserError(f"{place}.{key} must be a whole number from {least}, not {value!r}")
        self.build_processors()
        stream = ShardStream(
            shards,
            items,
            self.vis_processors["train"],
            self.text_processors["train"],
            shuffle=config.shuffle,
            seed=config.seed,
            skipped=SkipLog.of_run(),
        )
        logging.info("%s: %d shards, %d items per epoch", self.NAME, len(shards), items)
        return {"train": stream}
