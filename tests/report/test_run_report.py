"""softmask report: the folder of any run as a page, wherever the run is."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf
from PIL import Image
from report.test_page import Page, train_record

from softmask_plugin import cli
from softmask_plugin.config.check import shipped_configs
from softmask_plugin.errors import UserError
from softmask_plugin.report import report_run
from softmask_plugin.report.runs import PICTURES

VAL = [{"split": "val", "epoch": e, "step": 10 * e + 10, "txt_r1": 10.0 + e} for e in (0, 1)]
TEST = [{"split": "test", "epoch": 1, "step": 20, "txt_r1": 12.5, "img_r1": 7.25}]
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def folder(tmp_path):
    """A finished run's."""
    folder = tmp_path / "20260101-000000-abcd"
    (folder / "masks").mkdir(parents=True)
    for step in (5, 10, 100):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "masks" / f"step_{step}.png")
    (folder / "masks" / "pairs.pth").touch()
    config = {"model": {"arch": "softmask_retrieval"}, "run": {"max_epoch": 2, "note": EVIL}}
    OmegaConf.save(config, folder / "config.yaml")
    environment = {"torch": "9.9.9", "processor": "abacus"}
    (folder / "environment.json").write_text(json.dumps([environment]))
    write(folder, [train_record(10), train_record(20, epoch=1, skipped_steps=3), *VAL, *TEST])
    return folder


def write(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_finished_run(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    page = Page(folder / "report.html")
    text = page.words
    assert "softmask_retrieval 20260101-000000-abcd" in text
    assert "step 20, in epoch 1 (0 to 1)" in text
    assert "20 steps, 100 pairs/s, 3 steps skipped" in text
    table = "Metricval,epoch1test,epoch1Textfindsimage,R@1–7.25Imagefindstext,R@11112.5"
    assert table in text.replace(" ", "")
    places = [text.index(f"After step {step}") for step in (5, 10, 100)]
    assert places == sorted(places)
    assert "9.9.9" in text and "abacus" in text and "max_epoch: 2" in text
    assert page.tags.count("svg") == 6  # five curves of training, one of validation
    assert page.tags.count("img") == 3 and "script" not in page.tags and EVIL in page.text
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)


@pytest.mark.parametrize(
    ("records", "summary"),
    [
        ([], "Nothing is logged yet."),
        ([train_record(3)], "Logged up to step 3, in epoch 0 (0 to 1)."),
        (TEST, "Nothing was trained."),
    ],
)
def test_the_summary_says_how_far_the_run_is(folder, tmp_path, records, summary):
    for file in ("environment.json", "masks/step_5.png"):
        (folder / file).unlink()
    write(folder, records)
    path = report_run(folder, tmp_path / "new" / "out.html")
    assert summary in Page(path).words


def test_a_run_that_was_killed(folder):
    """Before its first log line, and within one."""
    (folder / "metrics.jsonl").unlink()
    assert "Nothing is logged yet." in report_run(folder).read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(json.dumps(train_record(7)) + '\n{"split": "tr')
    assert "up to step 7," in report_run(folder).read_text(encoding="utf-8")


def test_many_pictures_are_thinned_out(folder):
    for step in range(200):
        Image.new("RGB", (2, 2)).save(folder / "masks" / f"step_{step}.png")
    text = report_run(folder).read_text(encoding="utf-8")
    assert text.count("<img") == PICTURES
    assert "After step 0<" in text and "After step 199<" in text


def test_a_run_of_lavis_runner(tmp_path):
    """LAVIS's runner keeps no configuration or environment."""
    write(tmp_path, [train_record(1)])
    assert "the run noted none" in report_run(tmp_path).read_text(encoding="utf-8")


HINT = "There are no pictures of the masks: set run.panel_every."


@pytest.mark.parametrize(
    ("model", "run", "hinted"),
    [
        ({"arch": "softmask_pretrain"}, {}, True),
        ({"arch": "softmask_pretrain"}, {"panel_every": None}, True),
        ({"arch": "softmask_pretrain"}, {"panel_every": 50}, False),  # the first is yet to come
        ({"arch": "softmask_pretrain", "soft_mask": {"enabled": False}}, {}, False),
        ({"arch": "softmask_retrieval", "soft_mask": None}, {}, False),
        ({"arch": "softmask_retrieval", "soft_mask": {"enabled": True}}, {}, True),
        ({"arch": "softmask_vqa"}, {}, False),
        ({"arch": "albef_pretrain"}, {}, False),
    ],
)
def test_the_summary_says_how_to_get_pictures_of_masks(tmp_path, model, run, hinted):
    OmegaConf.save({"model": model, "run": run}, tmp_path / "config.yaml")
    write(tmp_path, [train_record(1)])
    assert (HINT in report_run(tmp_path).read_text(encoding="utf-8")) is hinted
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "masks" / "step_1.png")
    assert HINT not in report_run(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "masks" / "step_1.png").unlink()
    write(tmp_path, TEST)  # an evaluation trains nothing, so it could make none
    assert HINT not in report_run(tmp_path).read_text(encoding="utf-8")


def test_full_size_pretraining_makes_pictures_of_its_masks():
    configs = [OmegaConf.load(file) for file in shipped_configs().values()]
    full = [
        config.run
        for config in configs
        if (config.model.arch, config.model.model_type) == ("softmask_pretrain", "base")
    ]
    assert full and all(run.get("panel_every") for run in full)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "run: [", "config.yaml is not valid YAML"),
        ("environment.json", "[1", "environment.json is not a JSON list of objects"),
    ],
)
def test_a_broken_file_is_named(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        report_run(folder)


def test_a_folder_without_a_run_gets_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
