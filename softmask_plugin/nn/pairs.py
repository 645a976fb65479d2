"""One batched fusion pass for groups of pairs: positives, soft positives, negatives, MLM."""

from __future__ import annotations

from softmask_plugin.nn.bert import BertModel, ImageMemory
from softmask_plugin.nn.image_memory import View
from softmask_plugin.nn.tokens import Layout, Tokens


class Pairs:
    """Collects groups of captions, each with its view of the images, to fuse them at once."""

    def __init__(self) -> None:
        self.groups: dict[str, tuple[Tokens, View, Layout]] = {}
        self.fused: dict[str, Tokens] = {}

    def add(
        self, name: str, captions: Tokens, view: View = View(), wanted: Layout | None = None
    ) -> None:
        """Add a group of captions with the tokens that will be read: by default [CLS]."""
        self.groups[name] = captions, view, wanted or captions.layout.cls_only

    def done(self, name: str, fused: Tokens) -> None:
        """Add a group that was fused before, with the states of its wanted tokens."""
        self.fused[name] = fused

    def fuse(self, bert: BertModel, memory: ImageMemory) -> dict[str, Tokens]:
        """Multi-modal states of each group's wanted tokens, by name."""
        captions, views, wanted = zip(*self.groups.values(), strict=True)
        fused = bert.fuse(Tokens.cat(captions), memory, views, Layout.cat(wanted))
        return self.fused | dict(zip(self.groups, fused.split(wanted), strict=True))
