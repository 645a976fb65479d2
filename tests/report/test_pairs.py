"""softmask report on a run of one's own images: what its checkpoint makes of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from report.test_page import Page, train_record
from report.test_run_report import write
from torch.utils.data import DataLoader

from softmask_plugin import cli
from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.explain.trained import load_trained
from softmask_plugin.models.rerank import Reranker
from softmask_plugin.report.pairs import MISSES, build_datasets, worst_retrievals

SCORES = {"img_r1": 25.0, "txt_r1": 12.5}


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """The folder of a run on photos in a folder, whose second of three epochs was the best."""
    folder, model = tmp_path_factory.mktemp("own"), make_model()
    (folder / "photos").mkdir()
    rows = []
    for i, scene in enumerate(make_scenes("test", 8)):
        render(scene, 40).save(folder / "photos" / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [c.text for c in captions(scene)[:2]]})
    (folder / "val.json").write_text(json.dumps(rows))
    processor = {"eval": {"name": "softmask_image_eval", "image_size": 32}}
    data = {"data_type": "images", "images": str(folder / "photos"), "vis_processor": processor}
    data["text_processor"] = {"eval": {"name": "softmask_caption"}}
    data["captions"] = {"train": "gone.json", "val": str(folder / "val.json")}
    section = OmegaConf.to_container(OmegaConf.structured(model.options))
    config = {
        "model": {**section, "arch": "softmask_pretrain", "pretrained": None},
        "datasets": {"captions_folder": data},
        "run": {"max_epoch": 3, "k_test": 4, "valid_splits": ["val"]},
    }
    OmegaConf.save(config, folder / "config.yaml")
    model.tokenizer.save_vocabulary(str(folder))
    torch.save({"model": model.state_dict(), "config": config}, folder / "checkpoint_best.pth")
    evaluations = [
        {"split": "val", "epoch": i, "step": i + 1, **SCORES, "agg_metrics": score, "r_mean": score}
        for i, score in enumerate((10.0, 30.0, 20.0))
    ]
    write(folder, [train_record(1), *evaluations, train_record(9)])
    return folder


def test_training_pairs_are_built_if_there_are_no_others(run):
    read = {"data_type": "images", "images": str(run / "photos")}
    train = {"captions_folder": read | {"captions": {"train": str(run / "val.json")}}}
    assert [*build_datasets({"datasets": train})] == ["train"]
    val = OmegaConf.to_container(OmegaConf.load(shipped("datasets/scenes/retrieval.yaml")))
    val["datasets"]["scenes_retrieval"]["num"] = {"val": 2}
    assert [*build_datasets({"datasets": train | val["datasets"]})] == ["val"]


def report(*given):
    assert cli.main(["report", *map(str, given)]) == 0


def test_the_best_epoch_with_chance_and_pictures_of_the_checkpoint(run, tmp_path):
    report(run, "-o", tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    assert "25.0% Text finds image, R@1 chance 12.5%" in page.words
    assert "12.5% Image finds text, R@1 chance 12.5%" in page.words
    assert "val, epoch 1 Text finds image, R@1 25 12.5" in page.words.replace("1Text", "1 Text")
    assert "Mean of all recalls 30" in page.words
    assert "What each word sees" in page.words and "set run.panel_every" not in page.words
    assert "Captions whose own image ranks lowest" in page.words
    assert 2 <= page.tags.count("img") <= 2 * MISSES


@pytest.mark.parametrize("key", ["pretrained", "finetuned"])
def test_an_evaluation_shows_the_weights_that_it_had(run, tmp_path, key):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pth"))
    config = OmegaConf.load(run / "config.yaml")
    config.model |= {key: str(run / "checkpoint_best.pth"), f"load_{key}": True}
    config.run.evaluate = True
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    report(tmp_path / "run")
    page = Page(tmp_path / "run" / "report.html")
    assert "What each word sees" in page.words and "Without pairs" not in page.words


def test_kept_pictures_are_shown_instead(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "masks").mkdir()
    shutil.copy(run / "photos" / "0.png", tmp_path / "run" / "masks" / "step_1.png")
    report(tmp_path / "run")
    page = Page(tmp_path / "run" / "report.html")
    assert "What each word sees" not in page.words and "After step 1" in page.words


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("checkpoint_best.pth", "Without pairs: no checkpoint"),
        ("photos", "Without chance and pairs: datasets.captions_folder.images: there is no folder"),
    ],
)
def test_what_is_missing_is_named(run, tmp_path, missing, message):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(missing))
    config = (run / "config.yaml").read_text().replace(str(run), str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(config)
    report(tmp_path / "run")
    page = Page(tmp_path / "run" / "report.html")
    assert message in page.words and "Mean of all recalls 30" in page.words


@pytest.mark.parametrize("scoring", ["itm", "itm+itc", "itm+logit"])
def test_ranks_are_those_of_the_evaluation(run, scoring):
    trained = load_trained(run)
    (data,) = build_datasets(OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))).values()
    settings = {"k_test": len(data), "rerank_scoring": scoring}  # all images are re-ranked
    _, scores = Reranker(trained.model, settings).scores(DataLoader(data, batch_size=3))
    ranks = {
        text: int((scores[text] > scores[text, image]).sum()) + 1
        for text, image in data.txt2img.items()
    }
    lowest = sorted((max(ranks[t] for t in data.img2txt[i]) for i in data.img2txt), reverse=True)
    found = worst_retrievals(trained, data, settings)
    assert [miss.rank for miss in found] == [rank for rank in lowest if rank > 1][:MISSES]
    for miss in found:
        assert ranks[data.text.index(miss.caption)] == miss.rank


def test_without_candidates_similarity_alone_ranks(run):
    trained = load_trained(run)
    (data,) = build_datasets(OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))).values()
    _, scores = Reranker(trained.model, {"k_test": 0}).scores(DataLoader(data, batch_size=3))
    for miss in worst_retrievals(trained, data, {"k_test": 0}):
        text = data.text.index(miss.caption)
        assert miss.rank == (scores[text] > scores[text, data.txt2img[text]]).sum() + 1


def test_several_runs_side_by_side(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "other")
    config = (run / "config.yaml").read_text().replace("k_test: 4", "k_test: 6")
    (tmp_path / "other" / "config.yaml").write_text(config)
    report(run, "other")
    page = Page(tmp_path / "report.html")
    squeezed = page.words.replace(" ", "")
    assert "MetricA:val,epoch1B:val,epoch1Textfindsimage,R@12512.52512.5" in squeezed
    assert "run.k_test46" in squeezed and str(run) in squeezed


@pytest.mark.parametrize("name", ["scenes_retrieval", "captions_folder", "vqa_folder", "coco"])
def test_data_sets_that_lack_keys_or_are_of_another_kind_leave_the_page(run, tmp_path, name):
    write(tmp_path, [train_record(1)])
    OmegaConf.save({"datasets": {name: {}}, "run": {}}, tmp_path / "config.yaml")
    report(tmp_path)
    assert "Logged up to step 1" in (tmp_path / "report.html").read_text(encoding="utf-8")
