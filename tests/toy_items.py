"""Data sets in memory: for the tasks that score items, and for pretraining."""

from __future__ import annotations

import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from torch.utils.data import DataLoader, Dataset, default_collate
from toy_models import CAPTIONS


class Items(BaseDataset):
    """Images and an annotation of each; ``told`` maps keys of a sample to those of the annotation.

    It keeps the contract of foils and grounding.
    """

    def __init__(self, images, annotation, **told):
        super().__init__()
        self.images, self.annotation, self.told = images, annotation, told
        self._add_instance_ids()

    def __getitem__(self, index):
        row = self.annotation[index]
        told = {key: row[source] for key, source in self.told.items()}
        ids = {"instance_id": row["instance_id"], "index": index}
        return {"image": self.images[index], **told, **ids}


class Pairs(Dataset):
    """Noise with captions, as a data set of LAVIS's to pretrain with."""

    collater = staticmethod(default_collate)

    def __init__(self, size, side):
        self.images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "text_input": CAPTIONS[index % len(CAPTIONS)]}


def evaluate(task, model, dataset, batch_size=3):
    """What LAVIS's runners do for a split before they merge the results."""
    task.before_evaluation(model=model, dataset=dataset)
    loader = DataLoader(dataset, batch_size, collate_fn=dataset.collater)
    return task.evaluation(model, loader, cuda_enabled=False)
