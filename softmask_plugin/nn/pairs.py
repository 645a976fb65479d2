"""Groups of image-text pairs that one batched pass fuses: positives, negatives, masked, MLM."""

from __future__ import annotations

from softmask_plugin.nn.bert import BertModel
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import Packing, Tokens


class Pairs:
    """Groups of captions, each with its view of the images, to be fused together."""

    def __init__(self) -> None:
        self.groups: dict[str, tuple[Tokens, View, Packing]] = {}
        self.fused: dict[str, Tokens] = {}  # groups that are fused already: their wanted tokens

    def add(
        self, name: str, captions: Tokens, view: View = View(), wanted: Packing | None = None
    ) -> None:
        """Add a group of captions and the tokens whose fused states it needs: by default [CLS].
        A group that is already fused stays as it is."""
        if name not in self.fused:
            self.groups[name] = captions, view, wanted or captions.packing.cls_only

    def fuse(self, bert: BertModel, memory: ImageMemory) -> dict[str, Tokens]:
        """Multi-modal states of each group's wanted tokens, by name."""
        captions, views, wanted = zip(*self.groups.values(), strict=True)
        fused = bert.fuse(Tokens.cat(captions), memory, views, Packing.cat(wanted))
        return self.fused | dict(zip(self.groups, fused.split(wanted), strict=True))
