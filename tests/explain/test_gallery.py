"""softmask features and softmask search: a folder is encoded once, and searched by text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from softmask_plugin import cli
from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError
from softmask_plugin.explain import trained
from softmask_plugin.explain.gallery import Gallery, save_features, search_features
from softmask_plugin.explain.image import FOREIGN, explain_image
from softmask_plugin.explain.trained import Trained, load_trained

COUNT = 36  # more than the matching head scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes in nested folders, a file that is no image, and their features.npz."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "images" / "below").mkdir(parents=True)
    for i, scene in enumerate(make_scenes("test", COUNT)):
        render(scene, 60).save(folder / "images" / ("below" if i % 2 else ".") / f"{i}.png")
    (folder / "images" / "a.jpg").write_bytes(b"no image")
    given = ["--images", str(folder / "images"), "-o", str(folder / "features.npz")]
    assert cli.main(["features", *given]) == 0
    return folder


def search(folder, text, *more):
    return cli.main(["search", text, "--features", str(folder / "features.npz"), *more])


def test_features_are_those_of_the_model(folder):
    with np.load(folder / "features.npz", allow_pickle=False) as stored:
        names, features = stored["names"].tolist(), torch.from_numpy(stored["features"])
    assert len(names) == COUNT and {"0.png", "below/1.png"} <= set(names)
    bundled, scene = load_trained(), make_scenes("test", 2)[1]
    states = bundled.model.visual_encoder(bundled.image_processor(render(scene, 60))[None])
    expected = bundled.model.image_features(states[:, 0])[0]
    torch.testing.assert_close(features[names.index("below/1.png")], expected, atol=1e-5, rtol=0)


def test_search_finds_what_is_described(folder, capsys):
    for wanted in (0, 17):
        scene = make_scenes("test", COUNT)[wanted]
        text = captions(scene)[0].text
        assert search(folder, text, "--count", "3") == 0
        _, *lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and lines[0].endswith(f"/{wanted}.png")
        found = explain_image(render(scene, 60), text, load_trained())
        assert float(lines[0].split()[0]) == pytest.approx(found.score, abs=0.0051)
    assert search(folder, "star", "--count", str(COUNT)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + COUNT


@pytest.mark.parametrize("ranking", ["itm", "itm+itc", "itm+logit", "words"])
def test_a_search_ranks_as_the_evaluation_of_its_run(make_model, ranking):
    run = {"rerank_scoring": "itm+logit" if ranking == "words" else ranking, "k_test": 9}
    run |= {"rank_by": "words"} if ranking == "words" else {}
    model = make_model(local_weight=1.0, local_negatives="batch", temp=0.3).eval()
    trained = replace(Trained.of(model), run=run)
    scenes = make_scenes("test", 9)
    pictures = [render(scene, 32) for scene in scenes]
    text = captions(scenes[0])[0].text
    gallery = Gallery(trained, pictures)

    class Loader(list):
        dataset = SimpleNamespace(text=[text])

    images = torch.stack([trained.image_processor(picture) for picture in pictures])
    _, (scores,) = model.compute_sim_matrix(Loader([{"image": images}]), run)
    assert [hit.index for hit in gallery.search(text, 9)] == np.argsort(-scores).tolist()


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("!", (), "give a text with a word"),
        ("star", ("--count", "0"), "--count 1 or more"),
        ("star", ("--features", "none.npz"), "no file none.npz: make it with softmask features"),
        ("star", ("--features", __file__), "features; name the one it was made with by --checkp"),
    ],
)
def test_a_mistake_gets_one_line(folder, capsys, text, more, message):
    assert search(folder, text, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_photo_is_foreign_to_the_bundled_model(tmp_path, caplog):
    Image.new("RGB", (60, 60), "green").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    save_features(load_trained(), tmp_path, tmp_path / "features.npz")
    assert FOREIGN in caplog.messages
    assert f"left out: {tmp_path / 'b.png'}: no image of a known format" in caplog.messages
    with pytest.raises(UserError, match="no image of a known format: it has changed since"):
        (tmp_path / "a.png").write_bytes(b"no image")
        search_features(load_trained(), tmp_path / "features.npz", "a star", 1)


def test_a_file_of_features_runs_no_code(tmp_path, capsys):
    objects = np.array([Path("ran")], dtype=object)
    np.savez(tmp_path / "features.npz", features=objects, names=objects, folder="x")
    assert search(tmp_path, "star") == 2
    assert "not made by softmask features" in capsys.readouterr().err


def test_features_of_another_model_are_refused(folder, make_model, monkeypatch, capsys):
    monkeypatch.setattr(trained, "load_trained", lambda **_: Trained.of(make_model()))
    assert search(folder, "star") == 2
    assert "features.npz is of another model" in capsys.readouterr().err
