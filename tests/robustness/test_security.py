"""What SECURITY.md guarantees and no other test shows."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from explain.test_figure import explanation
from omegaconf.basecontainer import BaseContainer
from report.test_page import Page
from robustness.test_bad_configs import refusal

import softmask_plugin
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.foils import parse_foils
from softmask_plugin.datasets.tables.phrases import parse_phrases
from softmask_plugin.errors import UserError, one_line
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.files import download
from softmask_plugin.foil_metrics import foil_metrics
from softmask_plugin.models.weights import DEIT_URL
from softmask_plugin.pointing import group_suffixes
from softmask_plugin.report import loss_curves, write_report
from softmask_plugin.vocabulary import build_tokenizer

PACKAGE = Path(softmask_plugin.__file__).parent


class Runs:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(Path("ran").absolute()),)


@pytest.fixture
def here(config):
    """A sound YAML file, ``my.yaml``, in the current folder; what runs code makes ``ran``."""
    yield
    assert not Path("ran").exists()


# ---- no code from data, weights or YAML

# What runs a program, imports what a name says, or makes objects of a file's choice.
FORBIDDEN = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load", "joblib.load"),
    *("importlib.import_module", "import_module", "marshal.loads", "dill.load", "torch.hub.load"),
}
OPENED_BY_THE_USER = {"__main__.py": {"runpy.run_path"}}  # a script of the user's, run as asked


def calls(file: Path):
    """Each call of a source file: its name as written, and the names of its arguments."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_the_package_calls_nothing_that_runs_code_of_a_file(file):
    for name, arguments in calls(file):
        assert name not in FORBIDDEN, name
        assert not name.startswith(("subprocess.", "os.spawn", "os.exec")), name
        assert name != "runpy.run_path" or name in OPENED_BY_THE_USER.get(file.name, ())
        assert "trust_remote_code" not in arguments and "shell" not in arguments
        assert name != "torch.load" or "weights_only" in arguments


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [ran]",
        "!!python/object/new:os.mkdir [ran]",
        "!!python/object:softmask_plugin.errors.UserError {}",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1]",
    ],
)
@pytest.mark.parametrize("place", ["file", "options"])
def test_yaml_makes_no_objects(here, capsys, value, place):
    if place == "file":
        text = Path("my.yaml").read_text().replace("seed: 7", f"seed: {value}")
        Path("bad.yaml").write_text(text)
        assert "is not valid YAML" in refusal(capsys, file="bad.yaml")
    else:
        assert "could not determine a constructor" in refusal(capsys, f"run.seed={value}")


def test_yaml_can_ask_for_omegaconfs_own_resolvers_alone(here, capsys, monkeypatch):
    """They read the environment and the file itself; none imports or calls anything."""
    assert all(name.startswith("oc.") for name in BaseContainer._resolvers)
    monkeypatch.setenv("EVIL", "!!python/object/apply:os.mkdir [ran]")
    refusal(capsys, "run.seed=${oc.decode:${oc.env:EVIL}}")
    refusal(capsys, "run.seed=${python:os.mkdir('ran')}")


@pytest.mark.parametrize(
    "option",
    [
        "model.arch=os.system",
        "model.arch=../../evil",
        "model.model_type=/etc/passwd",
        "datasets.os.seed=1",
        "run.task=builtins.exec",
        "run.runner=os.system",
        "run.lr_sched=os.system",
        "model.itc.loss=os.system",
        "datasets.scenes_retrieval.vis_processor.train.name=os.system",
    ],
)
def test_names_in_a_yaml_are_looked_up_in_the_registry_alone(here, capsys, option):
    line = refusal(capsys, option)
    assert "unknown" in line or "no loss is registered" in line


@pytest.mark.parametrize("key", ["run.resume_ckpt_path", "model.pretrained", "model.vit_weights"])
def test_no_checkpoint_that_a_run_is_told_of_runs_code(here, capsys, monkeypatch, key):
    """Not even where torch is told to read any object."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": Runs(), "optimizer": {}, "epoch": 0}, "evil.pth")
    assert "evil.pth" in refusal(capsys, f"{key}={Path('evil.pth').absolute()}")


def test_a_tokenizers_folder_runs_no_code(here):
    folder = Path("tokenizer")
    build_tokenizer("scenes").save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file.write_text(json.dumps({**settings, "tokenizer_class": "Evil"}))
    (folder / "evil.py").write_text("import os\nos.mkdir('ran')\nclass Evil: pass\n")
    assert type(build_tokenizer(str(folder))).__name__ == "BertTokenizerFast"


# ---- downloads


def test_nothing_is_downloaded_but_through_fetch():
    """The hub's files come through its own client, which transformers calls."""
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text()
        for module in ("requests", "urllib.request", "wget", "http.client", "download_cached_file"):
            assert file.name == "download.py" or f"import {module}" not in source, file.name


@pytest.mark.parametrize("key", ["model.pretrained", "model.vit_weights"])
def test_a_yamls_checkpoints_come_over_https_alone(here, capsys, monkeypatch, key):
    monkeypatch.setattr(download.requests.Session, "get", None)  # nothing may be asked for
    assert "is not an https address" in refusal(capsys, f"{key}=http://localhost/a.pth")


def test_the_weights_that_deit_names_are_checked():
    assert DEIT_URL.startswith("https://") and download._HASH_IN_NAME.search(DEIT_URL)


# ---- what captions and names may hold

TEXTS = {
    "script": '<script>alert(1)</script><img src=x onerror="alert(1)">',
    "attribute": '" onload="alert(1)',
    "one dollar": "costs $5",
    "mathtext": r"$\frac{$ and $\unknown{1}$ $x^$",
    "LaTeX": r"\input{/etc/passwd} \write18{mkdir ran} $\mathrm{a}$",
    "template": "{{ 7 * 7 }} {% for %} ${7*7}",
    "entity": "&lt;b&gt; &amp;lt; ]]> <!-- -->",
    "terminal": "\x1b[2J\x07 \r\n",
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", TEXTS)
def test_a_caption_is_drawn_and_printed_as_it_is(here, monkeypatch, kind):
    """Also where the user's own matplotlib settings hand every text to LaTeX."""
    text = TEXTS[kind]
    monkeypatch.setattr("matplotlib.texmanager.TexManager.make_tex", None)
    record = {"split": "train", "step": 1, "time": 1, "pairs_per_s": 1, f"loss_{text}": 1}
    with mpl.rc_context({"text.usetex": True}):
        words = explanation(text)
        panel = word_panels(Shown(np.zeros((8, 8, 3), np.uint8), words, range(len(words.words))))
        file = write_report(
            "report.html",
            title=text,
            summary=text,
            metrics={},
            records=[record],
            panels=[panel],
            config={"caption": text},
            environment={text: text},
        )
        panel.savefig("panel.png")
        for curve in loss_curves([record]):
            curve.savefig("curves.png")
    page = Page(file)
    assert not {"script", "img", "iframe", "object", "embed"} & {*page.tags}
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.title.split() == text.split()
    assert "default-src 'none'" in page.source  # nor would the page run or fetch what it held


@pytest.mark.parametrize("group", ["\x1b[2J a\r\n", "a\ud800"], ids=["terminal", "surrogate"])
def test_groups_which_name_metrics_are_one_printable_line(tmp_path, group):
    row = {"image": "a.jpg", "caption": "a dog", "foil": "a cat", "group": group}
    phrase = {"image": "a.jpg", "phrase": "dog", "box": [0, 0, 1, 1], "category": group}
    for name, each in (("foils.json", row), ("phrases.json", phrase)):
        (tmp_path / name).write_text(json.dumps([each]))
    (foil,) = parse_foils(tmp_path / "foils.json")
    (mention,) = parse_phrases(tmp_path / "phrases.json")
    metrics = foil_metrics([{**foil, "itm": [1.0, 0.0], "itc": [1.0, 0.0]}])
    suffixes = [*group_suffixes(mention.categories), *group_suffixes(group)]
    assert len(suffixes) == 2 and all(map(str.isprintable, [*metrics, *suffixes]))


@pytest.mark.parametrize("kind", TEXTS)
def test_messages_and_logs_hold_no_line_and_no_command_of_a_files_own(here, kind, caplog):
    text = TEXTS[kind] + "\nsoftmask: error: forged"
    log = SkipLog(Path("skipped.log"))
    log.add("images", [text])
    assert log.path.read_text() == f"{one_line(text)}\n"
    for shown in (str(UserError(text)), caplog.records[-1].getMessage(), one_line(text)):
        assert shown.isprintable()
