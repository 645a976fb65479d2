"""Every shipped YAML loads, builds what it names, and describes its keys."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from softmask_plugin import launch
from softmask_plugin.ablate.plan import read_plan, shipped_plans
from softmask_plugin.config import check as config_check
from softmask_plugin.config.options import read_options
from softmask_plugin.config.paths import CONFIGS
from softmask_plugin.vocabulary import build_tokenizer

PROJECTS = config_check.shipped_configs()
PLAN = OmegaConf.load(CONFIGS / "ablation" / "pretrain_4m.yaml")
# Every project, and every variant of the plan of the same size: a file's name and overrides
RUNS = {name: (name, ()) for name in PROJECTS}
RUNS |= {f"ablation/{name}": (PLAN.base.config, own) for name, own in PLAN.variants.items()}
EVERY_FILE = sorted(CONFIGS.rglob("*.yaml"))
# Makes any model small, and downloads nothing
SMALL = {
    "tokenizer": "scenes",
    **{"load_pretrained": False, "load_finetuned": False},
    **{"vit_weights": None, "bert_weights": None},
    "vit": {"width": 24, "depth": 1, "heads": 2},
    "bert": {"vocab_size": None, "width": 24, "heads": 2, "intermediate": 24},
}


def for_trial(name):
    """On a CPU; evaluation of small models needs weights that no file ships."""
    without = ["model.load_pretrained=false"] if re.search("/eval/.*_(tiny|small)", name) else []
    return ["run.device=cpu", *without]


@cache  # checking a configuration takes a while
def loaded(name, *options):
    return launch.load_config(name, [*for_trial(name), *options], evaluate="/eval/" in name)


@pytest.fixture(params=RUNS, scope="module")
def project(request):
    name, options = RUNS[request.param]
    return loaded(name, *options)


def test_the_model_is_built(project):
    section = OmegaConf.to_container(project.model_cfg, resolve=True)
    cls = registry.get_model_class(section["arch"])
    read_options(cls.OPTIONS, section)  # every key is the schema's, with a value that it allows
    queue = {"queue_size": 8} if hasattr(cls.OPTIONS, "queue_size") else {}
    model = cls.from_config(OmegaConf.merge(section, SMALL, queue))
    assert type(model) is cls
    assert registry.get_task_class(project.run_cfg.task)
    assert registry.get_runner_class(project.run_cfg.runner)


@pytest.mark.parametrize("name", PROJECTS)
def test_lavis_own_script_reads_the_same_configuration(name):
    """Its train.py hands it the file and the overrides as they are."""
    theirs = Config(Namespace(cfg_path=PROJECTS[name], options=for_trial(name))).config
    theirs, ours = (
        OmegaConf.to_container(each, resolve=True) for each in (theirs, loaded(name).config)
    )
    for config in (theirs, ours):
        config["run"] |= {"output_dir": "absolute in ours", "evaluate": "set in ours"}
    assert theirs == ours


def test_the_data_sets_processors_fit_the_model(project):
    for name, section in project.datasets_cfg.items():
        builder = registry.get_builder_class(name)(section)
        builder.build_processors()
        used = ["train"] if project.run_cfg.get("train_splits") else []
        used += ["eval"] if project.run_cfg.get("test_splits") and name != "vg_vqa" else []
        for split in used:
            assert builder.text_processors[split] and builder.vis_processors[split]
            processor = section.vis_processor[split]
            assert processor.image_size == project.model_cfg.get("image_size", 256), name


def test_training_and_evaluation_rank_as_many_candidates():
    found = {}
    for name in PROJECTS:
        config = OmegaConf.load(PROJECTS[name])
        if config.run.task in ("retrieval", "image_text_pretrain") and "test_splits" in config.run:
            of = (*config.datasets, config.model.model_type)
            found.setdefault(of, set()).add(config.run.get("k_test", 128))
    assert len(found) > 4 and all(len(counts) == 1 for counts in found.values()), found


@pytest.mark.parametrize("name", PROJECTS)
def test_a_data_sets_keys_are_those_of_its_builder(name):
    """Ours check their keys; LAVIS's read those of their own YAML, and processors."""
    given = OmegaConf.load(PROJECTS[name]).datasets
    for data, section in given.items():
        builder = registry.get_builder_class(data)
        known = OmegaConf.load(builder.default_config_path()).datasets[data]
        assert {*(section or {})} <= {*known, "vis_processor", "text_processor"}


@pytest.mark.parametrize(
    ("data", "task", "files"),
    [
        ("captions_folder", "pretrain", "captions"),
        ("captions_folder", "retrieval", "captions"),
        ("vqa_folder", "vqa", "questions"),
        ("entailment_folder", "entailment", "sentences"),
        ("nlvr_folder", "nlvr", "sentences"),
    ],
)
def test_a_tiny_models_vocabulary_is_built_from_your_own_file(data, task, files, tmp_path):
    name = f"lavis_configs/projects/{data}/train/{task}_tiny.yaml"
    rows = "image,image0,image1,caption,question,answer,sentence,label\n"
    rows += "a.jpg,a.jpg,b.jpg,a quokka,a quokka,a quokka,a quokka,true\n" * 3
    (tmp_path / "train.csv").write_text(rows)
    config = loaded(name, f"datasets.{data}.{files}.train={tmp_path / 'train.csv'}")
    options = read_options(
        registry.get_model_class(config.model_cfg.arch).OPTIONS, config.model_cfg
    )
    assert "quokka" in build_tokenizer(options.tokenizer, 100).get_vocab()


def test_zero_shot_flickr30k_is_the_model_fine_tuned_on_coco():
    name = "lavis_configs/projects/retrieval/eval/zero_shot_flickr30k.yaml"
    config = loaded(name)
    assert "coco_retrieval" in config.model_cfg.finetuned and config.model_cfg.load_finetuned
    assert [*config.datasets_cfg] == ["flickr30k"]
    coco = loaded(name.replace("flickr30k", "coco")).model_cfg
    assert coco.pretrained.endswith("/ALBEF.pth") and not coco.load_finetuned


def test_every_registered_type_has_a_project_or_an_example():
    trained = {OmegaConf.load(path).model.arch for path in PROJECTS.values()}
    ours = {name for name in registry.list_models() if name.startswith("softmask_")}
    assert ours - trained == {"softmask_feature_extractor"}


@cache
def plan_of(name):
    """A shipped plan; reading it checks the configuration of every run, which takes seconds."""
    return read_plan(name, ["run.device=cpu"])


@pytest.mark.parametrize("name", shipped_plans())
def test_every_option_of_a_plan_is_accepted(name):
    plan = plan_of(name)
    given = [plan.options(variant, plan.base) for variant in plan.variants]
    keys = "datasets.", "model.image_size"  # all that processors depend on
    distinct = {tuple(each for each in one if each.startswith(keys)): one for one in given}
    for options in distinct.values():
        config = launch.load_config(plan.base.config, options)
        for data, section in config.datasets_cfg.items():
            registry.get_builder_class(data)(section).build_processors()


@pytest.mark.parametrize("name", shipped_plans())
def test_a_plan_says_what_each_variant_tests(name):
    lines = shipped_plans()[name].read_text("utf-8").splitlines()
    lines = lines[lines.index("variants:") :]
    named = [i for i, line in enumerate(lines) if re.match(r"  \w+:", line)]
    assert len(named) == len(plan_of(name).variants)
    assert all(lines[i - 1].startswith("  # ") for i in named)


def test_the_plans_of_scenes_can_share_a_folder():
    evaluation, tasks = map(plan_of, ("ablation/from_scratch", "ablation/from_scratch_tasks"))
    assert tasks.base == evaluation.base and tasks.baseline == evaluation.baseline
    assert tasks.variants.items() <= evaluation.variants.items()
    names = [stage.name for plan in (evaluation, tasks) for stage in plan.evaluate]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_a_file_says_what_it_is_for(file):
    lines = file.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 15
    assert all(len(line) <= 100 for line in lines if "https://" not in line)


def described(files):
    """Keys that have a comment on their line, or on the line above or below."""
    keys = set()
    for file in files:
        lines = ["", *Path(file).read_text("utf-8").splitlines(), ""]
        for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
            key = re.match(r"\s*([\w.]+):", line)
            if key and ("#" in line or any(x.strip().startswith("#") for x in (above, below))):
                keys.add(key[1])
    return keys


PLAIN = {  # names that say it all
    *("task", "runner", "device", "seed", "output_dir", "batch_size_train", "batch_size_eval"),
    *("num_workers", "max_epoch", "init_lr", "min_lr", "warmup_lr", "weight_decay", "evaluate"),
    *("warmup_steps", "train_splits", "beta2"),
}


def test_every_key_of_a_run_is_described_somewhere():
    used = {str(key) for path in PROJECTS.values() for key in OmegaConf.load(path).run}
    assert used - PLAIN <= described(PROJECTS.values())


def leaves(section):
    for key, value in section.items():
        yield str(key)
        if isinstance(value, DictConfig) and str(key) not in ("train", "val", "test", "eval"):
            yield from leaves(value)


@pytest.mark.parametrize("folder", sorted((CONFIGS / "datasets").iterdir()), ids=lambda p: p.name)
def test_every_key_of_a_data_set_is_described(folder):
    for file in folder.glob("*.yaml"):
        (section,) = OmegaConf.load(file).datasets.values()
        plain = {"name", "train", "val", "test", "eval", "vis_processor", "text_processor"}
        plain |= {"data_type", "max_words", "randaugment_ops", "std"}
        assert set(leaves(section)) - plain <= described([file]), file.name
