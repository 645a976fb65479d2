"""``launch.run``: which folder a run gets, and what it leaves open."""

from __future__ import annotations

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import json
import socket

import pytest
import torch
from toy_folders import build, write

from softmask_plugin import launch
from softmask_plugin.config.values import check_datasets
from softmask_plugin.errors import UserError
from softmask_plugin.explain.trained import load_trained
from softmask_plugin.models import SoftMaskClassification
from softmask_plugin.runners import run_folder

TRAIN = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"


@pytest.fixture
def options(tmp_path):
    return [
        f"run.output_dir={tmp_path}",
        "run.max_epoch=1",
        "run.batch_size_train=4",
        "run.batch_size_eval=4",
        "datasets.scenes_pretrain.num.train=8",
        "run.valid_splits=[]",
        "run.test_splits=[]",
        "run.num_workers=0",
        "model.load_pretrained=false",
    ]


def test_evaluation_leaves_the_training_run_alone(tmp_path, options):
    """Whether the command or the option asks for it, and although the option asks to resume."""
    trained, _ = launch.run(TRAIN, options)
    names = ("metrics.jsonl", "config.yaml", "log.txt")
    before = {name: (trained.output_dir / name).read_bytes() for name in names}
    given = [*options, "run.resume_ckpt_path=auto", "run.evaluate=true"]
    evaluated, _ = launch.run(TRAIN, given)
    assert evaluated.output_dir != trained.output_dir
    assert {name: (trained.output_dir / name).read_bytes() for name in names} == before


def test_a_run_leaves_nothing_open(options):
    evaluated, _ = launch.run(TRAIN, [*options, "run.evaluate=true"])
    boards = evaluated.log.boards
    boards.write({"split": "test", "loss": 1.0})  # opens TensorBoard
    assert boards._writer is not None
    evaluated.evaluate(skip_reload=True)
    assert evaluated.output_dir not in run_folder._held
    assert boards._writer is None


def test_a_run_that_cannot_start_lets_its_folder_go(tmp_path, options):
    with pytest.raises(UserError, match="no tokenizer"):
        launch.run(TRAIN, [*options, "model.tokenizer=missing.txt"])
    assert not any(folder.parent == tmp_path for folder in run_folder._held)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("run.rank_by=words", "run.rank_by is 'words', but the model's words were not trained"),
        ("run.use_dist_eval_sampler=true", "set run.use_dist_eval_sampler=false"),
    ],
)
def test_splits_that_could_not_be_ranked_are_found_before_training(
    config, monkeypatch, mistake, message
):
    def several(run):
        run.distributed = True

    monkeypatch.setattr(launch, "init_distributed", several)
    wrong = launch.load_config(config, ["run.valid_splits=[val]", mistake])
    with pytest.raises(UserError, match=message), launch.prepared(wrong):
        pass


def test_a_process_of_a_job_that_lacks_its_place(config, monkeypatch):
    cfg = launch.load_config(config)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is set, but LOCAL_RANK is not"):
        launch.init_distributed(cfg.run_cfg)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    launch.init_distributed(cfg.run_cfg)  # world_size is 1: a job of one process
    assert cfg.run_cfg.distributed is False
    cfg.run_cfg.world_size = 2
    with pytest.raises(UserError, match="1 of 2 cannot meet .*run.dist_url env:.*MASTER_ADDR"):
        launch.init_distributed(cfg.run_cfg)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with socket.socket() as taken, monkeypatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="process 0 of 2 cannot meet .*EADDRINUSE"):
            launch.init_distributed(cfg.run_cfg)
    cfg.run_cfg.device = "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="SLURM_LOCALID is 1, but this process sees 1 CUDA dev"):
        launch.init_distributed(cfg.run_cfg)


def test_two_data_sets_to_evaluate():
    splits = {"train": [], "val": []}
    with pytest.raises(UserError, match="datasets.a, datasets.b have a 'val' split each"):
        check_datasets(None, {"a": splits, "b": splits, "c": {"test": []}})
    check_datasets(None, {"a": splits, "c": {"train": [], "test": []}})


def test_splits_whose_images_are_scaled_differently(colour_photos, caplog):
    rows = [{"image": "red.png", "sentence": "It is red", "label": 0}]
    options = [f"sentences.{split}={write(f'{split}.json', rows)}" for split in ("train", "val")]
    train, val = (f"vis_processor.{mode}.mean=[0.5,0.5,0.5]" for mode in ("train", "eval"))
    check_datasets(None, {"a": build("entailment_folder", *options, train, val)})
    assert not caplog.text
    check_datasets(None, {"a": build("entailment_folder", *options, train)})
    assert "images are scaled by mean (0.48145466, " in caplog.text
    assert " and mean (0.5, 0.5, 0.5), std " in caplog.text


def test_more_labels_than_classes(colour_photos, tmp_path):
    labels = [{"image": "red.png", "sentence": "It is red", "label": label} for label in "abcde"]
    data = "datasets.entailment_folder"
    given = [
        f"run.output_dir={tmp_path}/runs",
        "run.batch_size_train=5",
        "run.max_epoch=1",
        "run.valid_splits=[]",
        "run.test_splits=[]",
        "model.image_size=32",
        f"{data}.images=photos",
        f"{data}.sentences.train={write(tmp_path / 'train.json', labels)}",
        f"{data}.labels=[a,b,c,d,e]",
    ]
    name = "entailment_folder/train/entailment_tiny"
    message = "entailment_folder has the 5 labels a, b, c, d, e, .* set model.num_classes=5"
    with pytest.raises(UserError, match=message):
        launch.run(name, given)
    runner, _ = launch.run(name, [*given, "model.num_classes=5"])
    other = ["model.num_classes=5", f"{data}.labels=[b,a,c,d,e]"]
    weights = f"model.pretrained={runner.output_dir}"
    with pytest.raises(UserError, match=r"trained on them in another order: set \[a, b, c, d, e\]"):
        launch.run(name, [*given, *other, weights])


# ---- weights


EVALUATE = "lavis_configs/projects/scenes/eval/retrieval_tiny.yaml"
FLICKR = "lavis_configs/projects/retrieval/eval/flickr30k.yaml"


@pytest.mark.parametrize(
    ("config", "option", "message"),
    [
        (EVALUATE, "model.finetuned=a.pth", "model.finetuned would not .*load_finetuned=true"),
        (FLICKR, "model.pretrained=a.pth", "model.pretrained would not .*load_finetuned=false"),
        (EVALUATE, "model.pretrained=null", "no weights to evaluate.*load_pretrained=false"),
    ],
)
def test_weights_that_would_not_be_loaded(config, option, message):
    with pytest.raises(UserError, match=message):
        launch.load_config(config, [option, "run.device=cpu"], evaluate=True)


def test_pretrained_weights_that_are_switched_off():
    given = ["model.pretrained=a.pth", "model.load_pretrained=false"]
    with pytest.raises(UserError, match="would not be loaded.*add model.load_pretrained=true"):
        launch.load_config(TRAIN, given)


def test_a_file_that_does_not_exist_ends_the_evaluation(tmp_path):
    given = [f"run.output_dir={tmp_path}", f"model.pretrained={tmp_path}/missing.pth"]
    with pytest.raises(UserError, match="no checkpoint at .*missing.pth"):
        launch.run(EVALUATE, given, evaluate=True)


@pytest.mark.parametrize(
    ("task", "head"), [("entailment", "cls_head"), ("nlvr", "cls_head"), ("vqa", "text_decoder")]
)
def test_a_head_that_no_checkpoint_holds_is_not_scored(tmp_path, task, head):
    given = [
        f"run.output_dir={tmp_path}",
        f"datasets.scenes_{task}.num.test=8",
        "model.pretrained=shipped:scenes_tiny",
    ]
    with pytest.raises(UserError, match=f"no {head} that fits, so the scores would be random"):
        launch.run(f"scenes/eval/{task}_tiny", given, evaluate=True)


def test_a_head_of_another_shape_is_new(make_other, tmp_path):
    trained = make_other(SoftMaskClassification)
    torch.save({"model": trained.state_dict()}, tmp_path / "trained.pth")
    for classes, heads in ((trained.options.num_classes, []), (5, ["cls_head"])):
        model = make_other(SoftMaskClassification, num_classes=classes)
        model.load_checkpoint(tmp_path / "trained.pth")
        assert model.new_heads == heads


MEAN = (0.1, 0.2, 0.3)


def test_a_runs_folder_or_checkpoint_is_evaluated_with_nothing_else_to_name(
    tmp_path, options, monkeypatch
):
    data = "datasets.scenes_retrieval"
    trained, _ = launch.run(
        "lavis_configs/projects/scenes/train/retrieval_tiny.yaml",
        [
            *[each.replace("scenes_pretrain", "scenes_retrieval") for each in options],
            f"{data}.num.test=8",
            f"{data}.vis_processor.eval.mean={list(MEAN)}",
            f"{data}.text_processor.eval.max_words=6",
            "run.test_splits=[test]",
        ],
    )
    moved, alone = tmp_path / "moved", tmp_path / "alone" / "mine.pth"
    trained.output_dir.rename(moved)
    for name in ("vocab.txt", "config.yaml"):
        (moved / name).unlink()
    alone.parent.mkdir()
    (moved / "checkpoint_0.pth").rename(moved / "checkpoint_best.pth")
    content = torch.load(moved / "checkpoint_best.pth", weights_only=True)
    content["config"]["model"]["finetuned"] = "elsewhere.pth"  # full-size types name one
    content["config"]["run"]["world_size"] = 8  # processes
    torch.save(content, moved / "checkpoint_best.pth")
    alone.write_bytes((moved / "checkpoint_best.pth").read_bytes())
    line = (moved / "metrics.jsonl").read_text().splitlines()[-1]
    expected = {k: v for k, v in json.loads(line).items() if k not in ("split", "epoch", "step")}
    monkeypatch.setenv("SLURM_PROCID", "0")  # in a job of one process
    monkeypatch.setenv("SLURM_LOCALID", "0")
    for given in (moved, alone):
        evaluated, results = launch.run(str(given), [], evaluate=True)
        assert results["test"] == pytest.approx(expected)
        state = evaluated.model.state_dict()
        assert all(torch.equal(state[name], v) for name, v in trained.model.state_dict().items())
        images = evaluated.datasets["test"].vis_processor
        explained = load_trained(given)
        assert (images.mean, explained.image_processor.mean) == (MEAN, MEAN)
        texts = (evaluated.datasets["test"].text_processor, explained.text_processor)
        assert [text.max_words for text in texts] == [6, 6]


def test_a_checkpoint_that_names_no_configuration_cannot_be_evaluated_alone(tmp_path):
    torch.save({"temp": torch.ones(())}, tmp_path / "ALBEF.pth")
    with pytest.raises(UserError, match="ALBEF.pth does not say .*add model.pretrained="):
        launch.load_config(tmp_path / "ALBEF.pth", evaluate=True)
