"""run.keep_features: a frozen backbone sees each image once."""

from __future__ import annotations

import pytest
import torch
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask
from PIL import Image
from toy_models import CAPTIONS
from toys import build, read_metrics

from softmask_plugin.datasets.images import UnreadableImageError
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.task_datasets import PretrainDataset, RetrievalDataset
from softmask_plugin.errors import UserError
from softmask_plugin.models import SoftMaskPretrain

HYBRID = {
    "image_size": 64,
    "vit": {"backbone": "tf_efficientnet_lite0", "patch_size": 32, "width": 32, "heads": 2},
}


def split(cls, processor="softmask_image_eval", count=6):
    """Plain images, two items to each."""
    images = [Image.new("RGB", (70, 60), (40 * i, 90, 200 - 30 * i)) for i in range(count // 2)]
    items = [
        {"image": f"{i // 2}.jpg", "image_id": i, "caption": [CAPTIONS[i]]} for i in range(count)
    ]
    pixels = registry.get_processor_class(processor)(image_size=64)
    words = registry.get_processor_class("softmask_caption")()
    opened = []

    def open_images(item, _):
        opened.append(item["image"])
        return [images[int(item["image"][0])]]

    return cls(pixels, words, items, open_images), opened


def run(make_other, folder, model=HYBRID, processor="softmask_image_eval", **options):
    torch.manual_seed(0)
    train, opened = split(PretrainDataset, processor)
    val, _ = split(RetrievalDataset)
    runner = build(
        folder,
        RetrievalTask(None),
        make_other(SoftMaskPretrain, **model),
        "job",
        {"train": train, "val": val},
        batch_size_train=3,
        batch_size_eval=2,
        max_epoch=2,
        valid_splits=["val"],
        use_dist_eval_sampler=False,
        k_test=2,
        **options,
    )
    return runner, opened


def test_it_trains_as_with_the_images_and_opens_each_once(make_other, tmp_path):
    plain, opened = run(make_other, tmp_path / "plain")
    plain.train()
    assert len(opened) == 12
    runner, opened = run(make_other, tmp_path / "kept", keep_features=True)
    calls = []
    backbone = runner._model.visual_encoder.patch_embed.backbone
    backbone.register_forward_hook(lambda _, images, __: calls.append(len(images[0])))
    opened.clear()
    runner.train()
    assert opened == ["0.jpg", "1.jpg", "2.jpg"]
    assert sum(calls) == 2 * 3  # of the train and of the val split
    own, theirs = (read_metrics(each.output_dir) for each in (runner, plain))
    for one, other in zip(own, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in {"loss", "loss_itc", "loss_mlm", "txt_r1", "img_r1"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_it_evaluates_as_with_the_images_and_opens_each_once(make_other, tmp_path):
    found, seen = [], []
    for keep in (False, True):
        options = {"evaluate": True, "test_splits": ["val"]}
        runner, _ = run(make_other, tmp_path / str(keep), keep_features=keep, **options)
        calls = []
        backbone = runner._model.visual_encoder.patch_embed.backbone
        backbone.register_forward_hook(lambda _, images, __, to=calls: to.append(len(images[0])))
        found.append(runner.train()["val"])
        seen.append(sum(calls))
    assert seen == [6, 3]
    assert found[0] == found[1]


def test_features_are_kept_once_if_evaluation_follows_training(make_other, tmp_path):
    runner, _ = run(make_other, tmp_path, keep_features=True, test_splits=["val"])
    assert runner.train() == runner.evaluate()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": {}}, "no backbone is frozen"),
        ({"panel_every": 1}, "panel_every"),
        ({"resume_ckpt_path": "none.pth"}, "no checkpoint at none.pth"),  # before it takes time
    ],
)
def test_what_cannot_be_kept_gets_one_line(make_other, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        runner, _ = run(make_other, tmp_path, keep_features=True, **options)
        runner.train()
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_gives_way_with_its_caption(make_other, tmp_path):
    """To the next item, as without kept features."""
    found = []
    for keep in (False, True):
        runner, _ = run(make_other, tmp_path / str(keep), keep_features=keep)
        (data,) = runner.loader("train").dataset.datasets
        opening = data.open_images

        def open_images(item, side, opening=opening):
            if item["image"] == "1.jpg":
                raise UnreadableImageError("1.jpg: broken")
            return opening(item, side)

        data.open_images, data.skipped = open_images, SkipLog(muted=True)
        if keep:
            runner._keep_features("train")
        found.append([data[i]["text_input"] for i in range(len(data))])
    assert found[0] == found[1] and found[0][2] == found[0][3] == found[0][4]


def test_each_crop_of_an_image_has_features_of_its_own(make_other, tmp_path):
    runner, _ = run(make_other, tmp_path, keep_features=True)
    (data,) = runner.loader("train").dataset.datasets
    for number, item in enumerate(data.annotation):
        item["crop"] = (0, 0, 20, 20 + 10 * (number % 2))
    shades = Image.linear_gradient("L").convert("RGB")
    data.open_images = lambda item, _: [shades.crop(item["crop"])]
    runner._keep_features("train")
    first, second, third, *_ = (data[i]["image"] for i in range(len(data)))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, third)  # of another file, with the same content
