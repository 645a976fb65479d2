"""A frozen backbone's features of all images, computed once and kept for every epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from softmask_plugin.datasets.images import UnreadableImageError
from softmask_plugin.datasets.task_datasets import ItemDataset, NLVRDataset
from softmask_plugin.errors import UserError
from softmask_plugin.models.rerank import progress_bar
from softmask_plugin.nn.momentum import is_frozen
from softmask_plugin.processors.image import ImageEvalProcessor, ImageTrainProcessor

ON = "run.keep_features is true, but "


def _processed(dataset: ItemDataset, numbers: list[int]) -> tuple[list[Any], Tensor]:
    """Processed images of some items, (items, 3, H, W), and what identifies each; the next item's
    stands in for an image that cannot be read."""
    opened = [dataset.open(number) for number in numbers]
    pixels = [dataset.vis_processor(image) for _, (image,) in opened]
    return [_image_of(item) for item, _ in opened], default_collate(pixels)


def keep_features(
    datasets: Iterable[Any],
    encoder: Any,
    autocast: AbstractContextManager[Any],
    device: torch.device,
    **loading: Any,
) -> None:
    """Let data sets give features in place of their images, which are processed as for evaluation.

    Args:
        datasets: Map-style data sets of single images, or several joined; changed in place.
        encoder: The image encoder; its backbone must be frozen.
        autocast: The precision to compute in and to keep.
        device: Where to compute; features are kept in main memory.
        loading: Options of the loader.

    Raises:
        UserError: Nothing is frozen, or a data set has no single images.
    """
    if not is_frozen(getattr(encoder.patch_embed, "backbone", encoder)):
        raise UserError(f"{ON}no backbone is frozen: set model.vit.backbone, or remove the key")
    for dataset in chain(*(getattr(each, "datasets", [each]) for each in datasets)):
        if not isinstance(dataset, ItemDataset) or isinstance(dataset, NLVRDataset):
            raise UserError(f"{ON}{type(dataset).__name__} has no single images: remove the key")
        if isinstance(dataset.vis_processor, nn.Identity):  # kept before
            continue
        if isinstance(train := dataset.vis_processor, ImageTrainProcessor):
            dataset.vis_processor = ImageEvalProcessor(train.image_size, train.mean, train.std)
        firsts: dict[Any, int] = {}  # several items may share an image
        for number, item in enumerate(dataset.annotation):
            firsts.setdefault(_image_of(item), number)
        numbers: Any = [*firsts.values()]  # which the loader takes as a data set
        features, found = [], []
        images = DataLoader(numbers, collate_fn=partial(_processed, dataset), **loading)
        with torch.no_grad(), autocast:
            for which, batch in progress_bar(images, desc="features", unit="batch"):
                features.append(encoder.shared(batch.to(device)).cpu())
                found += which
        kept, rows = torch.cat(features), {image: row for row, image in enumerate(found)}
        logging.info("features of %d images kept: %d MB", len(rows), kept.nbytes // 10**6)
        dataset.open_images = partial(_open, kept, rows)
        dataset.vis_processor = nn.Identity()


def _open(features: Tensor, rows: dict[Any, int], item: dict[str, Any], _: int | None) -> list[Any]:
    image = _image_of(item)
    if image not in rows:
        raise UnreadableImageError(f"{image[0]}: unreadable when features were computed")
    return [features[rows[image]]]


def _image_of(item: dict[str, Any]) -> tuple[Any, Any]:
    """What tells images apart; a rendered item has no file."""
    return item.get("image", item["instance_id"]), item.get("crop")
