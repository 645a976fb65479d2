"""Data sets; importing this registers their builders with LAVIS."""

import softmask_plugin.datasets.folders.builders
import softmask_plugin.datasets.folders.phrases
import softmask_plugin.datasets.folders.refcoco
import softmask_plugin.datasets.scenes.builders
import softmask_plugin.datasets.shards.builder  # noqa: F401
