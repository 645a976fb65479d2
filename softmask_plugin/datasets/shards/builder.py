"""Images and captions streamed from WebDataset shards: for data that no folder holds."""

from __future__ import annotations

import logging

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.builder import Builder
from softmask_plugin.datasets.shards.files import count_samples, find_shards
from softmask_plugin.datasets.shards.stream import ShardStream
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.registry import register


@register("builder", "caption_shards")
class CaptionShardsBuilder(Builder):
    """Builds ``train``, a stream. Relative paths start from the current folder."""

    DATASET_CONFIG_DICT = {"default": shipped("datasets/caption_shards/default.yaml")}

    def build(self) -> dict[str, ShardStream]:
        """Build the stream; UserError at a wrong key or value, or if nothing counts the samples."""
        self._check_keys()
        shards = find_shards(self.config.get("shards") or [], f"{self.place}.shards")
        if self.config.get("items") is None:
            items = count_samples(shards, f"{self.place}.items")
        else:
            items = self._number("items", 1)
        shuffle, seed = self._number("shuffle", 0), self._number("seed", 0)
        self.build_processors()
        processors = self.vis_processors["train"], self.text_processors["train"]
        stream = ShardStream(shards, items, *processors, shuffle, seed, SkipLog.of_run())
        logging.info("%s: %d shards, %d items per epoch", self.NAME, len(shards), items)
        return {"train": stream}
