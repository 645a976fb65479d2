"""The softmask command, its launcher, the checks of YAML files, and the doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lavis
import pytest
import torch
from lavis.runners import RunnerBase
from lavis.tasks.base_task import BaseTask
from PIL import Image

import softmask_plugin.__main__ as script_runner
from softmask_plugin import cli, launch
from softmask_plugin.config import check as config_check
from softmask_plugin.config.paths import CONFIGS, find_file, shipped_configs, shipped_plans
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.host import doctor, stack


def weights(runner, name="checkpoint_0.pth"):
    return torch.load(runner.output_dir / name, weights_only=True)["model"]


# ---- launching


def test_evaluate_repeats_the_results_of_training(config, tmp_path):
    trained, after_training = launch.run(config)
    checkpoint = trained.output_dir / "checkpoint_0.pth"
    options = [f"model.pretrained={checkpoint}", "run.seed=8"]
    evaluated, results = launch.run(config, options, evaluate=True)

    assert results == after_training
    assert 0 <= results["test"]["txt_r1"] <= 100
    assert trained.output_dir != evaluated.output_dir
    assert trained.output_dir.parent == evaluated.output_dir.parent == tmp_path / "runs"
    assert not list(evaluated.output_dir.glob("checkpoint_*"))


def test_the_seed_decides_everything(config):
    first, again, other = (
        weights(launch.run(config, [f"run.seed={seed}", "run.test_splits=[]"])[0])
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["vision_proj.weight"], other["vision_proj.weight"])


def test_options_choose_the_defaults_they_name(config):
    """LAVIS's Config keeps the defaults of the file's model_type; ours follows the options."""
    assert launch.load_config(config).model_cfg.tokenizer == "scenes"
    options = ["model.model_type=base", "model.image_size=60", "datasets.scenes_pretrain.seed=3"]
    cfg = launch.load_config(config, options)
    assert "tokenizer" not in cfg.model_cfg
    assert cfg.model_cfg.vit_weights == "deit"
    assert cfg.model_cfg.queue_size == 8
    assert cfg.datasets_cfg.scenes_pretrain.seed == 3
    assert cfg.datasets_cfg.scenes_pretrain.data_type == "images"


def test_data_sets_log_to_the_folder_of_their_own_run(config, tmp_path, monkeypatch):
    """Also with LAVIS's own runner, which registers that folder itself; twice in one process."""
    Image.new("RGB", (8, 8)).save("a.png")
    Path("captions.json").write_text(
        '[{"image": "a.png", "caption": "a"}, {"image": "b.png", "caption": "b"}]'
    )
    monkeypatch.setattr(RunnerBase, "train", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = "datasets.captions_folder"
    options = [f"{data}.images=.", f"{data}.captions.train=captions.json", "run.runner=runner_base"]
    options += ["run.device=cuda"]  # that runner takes no other
    options += [f"{data}.vis_processor.{mode}.image_size=60" for mode in ("train", "eval")]
    runners = [launch.run(config, options)[0] for _ in range(2)]
    logs = [runner.output_dir / "skipped_images.log" for runner in runners]
    assert logs[0] != logs[1]
    for runner, log in zip(runners, logs, strict=True):
        assert log.read_text() == f"{tmp_path / 'b.png'}: no such file\n"
        assert runner.result_dir == runner.output_dir / "result"


def test_a_script_runs_with_the_plugin_registered(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, helper\n"
        "from lavis.common.registry import registry\n"
        "assert __name__ == '__main__'\n"
        "helper.seen = sys.argv, 'softmask_pretrain' in registry.list_models()\n"
    )
    (tmp_path / "helper.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["-m", str(script), "--cfg-path", "x.yaml"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert script_runner.main() == 0
    assert sys.modules.pop("helper").seen == ([str(script), "--cfg-path", "x.yaml"], True)


def test_a_missing_script_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-m", "nowhere.py"])
    assert script_runner.main() == 2
    assert "no file 'nowhere.py'" in capsys.readouterr().err


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["xyz"], "unknown command 'xyz': choose from 'ablate', 'app', 'check', "),
        (["train", "--cfg-pth=x"], "train has no option '--cfg-pth': did you mean '--cfg-path'?"),
        (["explain", "--capton", "a dog"], "no option '--capton': did you mean '--caption'?"),
        (["train", "--cfg-path", "."], "did you mean 'my.yaml'?"),
        (["train", "--cfg", "my.yaml", "--options", "run.max_epoc=1"], "did you mean 'max_epoch'?"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(config, capsys, arguments, message):
    """One that is nearer than all others comes alone."""
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softmask: error: ") and message in line


def test_options_add_up(config, capsys):
    more = ["--options", "run.max_epoc=1"]
    assert cli.main(["train", "--cfg-path", "my.yaml", *more, "--options", "run.seed=3"]) == 2
    assert "did you mean 'max_epoch'?" in capsys.readouterr().err


def test_many_choices_are_not_all_listed():
    assert suggest("other", [f"m{i}" for i in range(900)]).endswith("'m133' and 860 more")
    assert suggest("other", ["m1", "m2"]) == "choose from 'm1', 'm2'"


def test_a_text_may_begin_like_an_option(capsys):
    text = ["--image", "a.png", "--caption", "--no option of ours"]
    assert cli.main(["explain", *text, "--checkpoint", "missing.pth"]) == 2
    assert "no checkpoint at missing.pth" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without_it(config, capsys):
    assert cli.main(["evaluate", "--cfg-path", config, "--options", "run.device=cuda"]) == 2
    assert "run.device=cpu" in capsys.readouterr().err


def test_evaluating_nothing_is_a_mistake(config, capsys):
    assert cli.main(["evaluate", "--cfg-path", config, "--options", "run.test_splits=[]"]) == 2
    assert "run.test_splits is empty" in capsys.readouterr().err


def test_other_exceptions_keep_their_traceback(config, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(launch, "run", crash)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "--cfg-path", config])


# ---- YAML files


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("captions_folder/train/pretrain_tiny", "captions_folder/train/pretrain_tiny"),
        ("captions_folder/train/pretrain_tiny.yaml", "captions_folder/train/pretrain_tiny"),
        ("projects/scenes/eval/vqa_tiny.yaml", "scenes/eval/vqa_tiny"),
        ("lavis_configs/projects/scenes/eval/vqa_tiny.yaml", "scenes/eval/vqa_tiny"),
        (str(CONFIGS / "projects" / "vqa" / "train" / "vqav2.yaml"), "vqa/train/vqav2"),
        ("vqav2_test", "vqa/eval/vqav2_test"),
        ("pretrain/train/pretrain_4m", "pretrain/train/pretrain_4m"),
    ],
)
def test_a_shipped_file_has_a_short_name(name, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_check.find_config(name) == CONFIGS / "projects" / f"{found}.yaml"


@pytest.mark.parametrize("name", ["small", "ablation/small", "lavis_configs/ablation/small.yaml"])
def test_a_shipped_plan_has_a_short_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("--plan", name, shipped_plans()) == CONFIGS / "ablation" / "small.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mine.yaml", "did you mean 'my.yaml'?"),
        (
            "lavis_config/projects/retrieval/eval/coco.yaml",
            "did you mean 'retrieval/eval/coco' or ",
        ),
        (
            "pretrain_tiny",
            "did you mean 'caption_shards/train/pretrain_tiny' or "
            "'captions_folder/train/pretrain_tiny' or 'scenes/train/pretrain_tiny'?",
        ),
        (
            "captions_folder/train/pretrain_tyni",
            "did you mean 'captions_folder/train/pretrain_tiny' or ",
        ),
        (
            "caption_folder/train/pretrain_base",
            "did you mean 'captions_folder/train/pretrain_base' or ",
        ),
        ("snli_ve", "did you mean 'snli_ve/eval/snli_ve' or 'snli_ve/train/snli_ve'?"),
        (
            "grounding",
            "did you mean 'grounding/eval/flickr30k_entities' or 'grounding/eval/refcoco_plus'?",
        ),
        ("something/else.yaml", "'softmask configs' lists those that are shipped"),
    ],
)
def test_a_missing_file_gets_the_nearest_names(config, name, hint):
    with pytest.raises(UserError) as caught:
        config_check.find_config(name)
    assert str(caught.value).startswith(f"--cfg-path: there is no file '{name}': {hint}")


def test_shipped_files_are_found_from_anywhere_but_local_ones_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, shipped = "lavis_configs/projects/vqa/train/vqav2.yaml", shipped_configs()
    assert config_check.find_config(name) == shipped["vqa/train/vqav2"]
    local = Path(name)
    local.parent.mkdir(parents=True)
    local.touch()
    assert config_check.find_config(f"./{name}") == config_check.find_config(name) == local


def test_lavis_own_files_pass_the_checks():
    refused = []
    files = sorted((Path(lavis.__file__).parent / "projects").rglob("*.yaml"))
    for file in files:
        try:
            config_check.read_config(file, ["run.device=cpu"])
        except UserError:
            refused.append(file.name)
    assert len(files) > 60
    # An unregistered model type, and an empty file: LAVIS cannot run these either.
    assert refused == ["coco_cap_ft_iter.yaml", "caption_coco_flant5xl_eval.yaml"]


def test_configs_lists_the_shipped_files_or_prints_one(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shipped = {**shipped_configs(), **shipped_plans()}
    assert [line.split()[0] for line in lines] == [*shipped]
    for name in ("ablation/small", "vqa/train/vqav2"):
        assert cli.main(["configs", name]) == 0
        assert capsys.readouterr().out == shipped[name].read_text()
    assert cli.main(["configs", "vqa2"]) == 2
    assert "did you mean 'vqa/train/vqav2'" in capsys.readouterr().err


# ---- doctor

GOOD = {**dict.fromkeys(stack.PACKAGES, "1.0"), "transformers": "4.26.1", "numpy": "1.26.4"}
GOOD["opencv-python-headless"] = "4.5.5.64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"numpy": "2.3.5", "opencv-python-headless": "4.12.0.88"}, None),
        ({"numpy": "2.3.5"}, "compiled against numpy 1"),
        ({"transformers": "4.56.2"}, "pip install transformers==4.51.3"),
        ({"transformers": "4.51.3"}, None),
        ({"salesforce-lavis": None}, "pip install salesforce-lavis==1.0.2"),
    ],
)
def test_versions_that_cannot_work_together(changes, message):
    problems = stack.problems({**GOOD, **changes})
    assert len(problems) == (message is not None)
    assert all(message in problem for problem in problems)


def test_doctor_finds_no_problem_here_and_knows_the_plugin(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    found = {finding["name"]: finding["value"] for finding in report["findings"]}
    assert found["torch"] == torch.__version__
    assert "softmask_pretrain (base, grounded, small, tiny, scenes_tiny)" in found["model"]
    assert "scenes_retrieval" in found["builder"]
    assert "softmask_image_train" in found["processor"]
    assert found["loss"] == "focal_itc"
    assert (
        found["step"].startswith("scenes/train/pretrain_tiny on ") and "loss_itc" in found["step"]
    )
    assert not [*tmp_path.iterdir()]


def test_doctor_says_what_keeps_a_step_from_working(capsys, monkeypatch):
    monkeypatch.setattr(BaseTask, "train_step", lambda self, model, samples: model.no_such_thing)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr()
    line = printed.out.splitlines()[-1]
    assert "! a training step fails in nn/modules/module.py, line " in line
    assert "AttributeError: 'SoftMaskPretrain' object has no attribute 'no_such_thing'" in line
    assert "Traceback" not in printed.out + printed.err


def test_doctor_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(stack, "installed", lambda: {**GOOD, "numpy": "2.0.0"})
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("! stack") for line in lines)
    assert "pip install 'numpy<2'" in lines[-1]
    assert cli.main(["configs"]) == 2  # the other commands say the same in one line
    assert "pip install 'numpy<2'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cuda", "driver", "action"),
    [(None, False, ""), ("12.8", False, ""), ("12.8", True, "driver"), (None, True, "CUDA build")],
)
def test_doctor_on_cuda_builds_and_drivers(monkeypatch, cuda, driver, action):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if driver else None)
    monkeypatch.setattr(doctor, "_with_lavis", lambda: [])
    (finding,) = (finding for finding in doctor.examine() if finding.name == "cuda")
    assert action in finding.advice
    assert bool(finding.advice) == bool(action)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists what its CPU can do")
def test_doctor_says_whether_the_cpu_has_fast_bf16(monkeypatch):
    monkeypatch.setattr(doctor, "_with_lavis", lambda: [])
    (finding,) = (finding for finding in doctor.examine() if finding.name == "cpu")
    flags = Path("/proc/cpuinfo").read_text().split()
    has = "avx512_bf16" in flags or "amx_bf16" in flags
    assert finding.value.endswith(f"use run.amp={'bf16' if has else 'false'}")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
