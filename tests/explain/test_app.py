"""The page of `softmask app`: as Streamlit runs it, and in a real browser if there is one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from omegaconf import OmegaConf
from PIL import Image
from toy_lavis import toy

from softmask_plugin import cli
from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError
from softmask_plugin.explain.gallery import Gallery, readable_images, wrong_caption
from softmask_plugin.explain.image import explain_image
from softmask_plugin.explain.trained import Trained, load_trained

pytest.importorskip("streamlit", reason="streamlit is not installed")
from streamlit.testing.v1 import AppTest

from softmask_plugin.explain import app

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def own_main_module(monkeypatch):
    """AppTest replaces ``__main__`` with its script, which processes of later tests would run."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture
def photo_bytes():
    content = BytesIO()
    Image.new("RGB", (30, 20), "navy").save(content, "PNG")
    return content.getvalue()


def shown(images=None, checkpoint=None):
    """The page, drawn once."""
    return drawn_by(f"app.page(app.Weights({checkpoint!r}), {images!r})")


def drawn_by(code):
    drawn = AppTest.from_string(
        f"from softmask_plugin.explain import app; {code}", default_timeout=60
    )
    drawn.run()
    assert not drawn.exception
    return drawn


def scores(drawn):
    return [float(metric.value) for metric in drawn.metric]


def press(drawn, label):
    (button,) = (button for button in drawn.button if button.label == label)
    button.click().run()
    assert not drawn.exception


def test_a_scene_starts_with_a_true_caption_and_a_word():
    drawn = shown()
    assert drawn.text_input("caption").value == captions(make_scenes("test", 1)[0])[0].text
    match, masked = scores(drawn)
    assert match > 0.8 and 0 <= masked <= 1
    assert "masked" in drawn.metric[1].label


def test_the_page_is_right_about_masks_and_the_bundled_model():
    """It was trained with the soft mask: its match hardly moves, although the named thing itself
    is hidden, and it rarely falls by more than a tenth."""
    trained, moves = load_trained(), []
    for scene in make_scenes("test", 8):
        found = explain_image(render(scene, 60), captions(scene)[0].text, trained)
        moves += (found.masked_scores - found.score).tolist()
    assert np.mean(np.abs(moves)) < 0.05 and np.mean(np.array(moves) < -0.1) < 0.05
    written = " ".join(" ".join(text.value for text in shown().markdown).split())
    assert "its match hardly moves. Without wrong captions, it takes the mask for a sign" in written


def test_a_wrong_caption_does_not_match_and_the_true_one_comes_back():
    drawn = shown()
    press(drawn, "Wrong one")
    assert scores(drawn)[0] < 0.2
    press(drawn, "True one")
    assert scores(drawn)[0] > 0.8
    press(drawn, "Next scene")
    assert drawn.text_input("caption").value == captions(make_scenes("test", 2)[1])[0].text


@pytest.mark.parametrize("text", ["", "  ?!", "<script>alert(1)</script>", "café [x](y) $1$ `a`"])
def test_any_caption_is_accepted(text):
    drawn = shown()
    drawn.text_input("caption").set_value(text).run()
    assert not drawn.exception and not drawn.error
    assert bool(drawn.metric) == bool(re.search(r"\w", text))


def test_a_long_caption_gets_a_warning():
    drawn = shown()
    assert not drawn.warning
    drawn.text_input("caption").set_value("ring " * 35).run()
    assert "only the first 28 of 35 words fit" in drawn.warning[0].value


def test_notes_say_what_the_bundled_model_was_trained_on(tmp_path):
    def notes(drawn):
        written = [caption.value for caption in drawn.caption]
        return app.BUNDLED_CAPTIONS in written, app.BUNDLED_IMAGES in written

    drawn = shown()
    assert notes(drawn) == (True, False)
    assert notes(drawn.radio("source").set_value(app.UPLOAD).run()) == (True, True)

    model = load_trained().model  # as a model of the user
    section = {**OmegaConf.to_container(OmegaConf.structured(model.options)), "pretrained": None}
    content = {"model": model.state_dict(), "config": {"model": section}}
    torch.save(content, tmp_path / "mine.pth")
    drawn = shown(checkpoint=str(tmp_path / "mine.pth"))
    assert notes(drawn) == (False, False)
    assert notes(drawn.radio("source").set_value(app.UPLOAD).run()) == (False, False)


@pytest.fixture
def served(monkeypatch):
    """What the command passes to the page instead of serving it."""
    given = []
    monkeypatch.setattr(app.bootstrap, "load_config_options", lambda flags: None)
    monkeypatch.setattr(app.bootstrap, "run", lambda file, hello, args, flags: given.extend(args))
    return given


def test_weights_from_elsewhere_are_served(tmp_path, monkeypatch, served):
    torch.save({"model": load_trained().model.state_dict()}, tmp_path / "ALBEF.pth")
    asked = ["app", "--checkpoint", str(tmp_path / "ALBEF.pth"), "--port", str(free_port())]
    assert cli.main(asked) == 2 and not served  # nothing says which model they belong to
    asked += ["--model", "softmask_image_text_matching", "--type", "scenes_tiny"]
    assert cli.main(asked) == 0
    monkeypatch.setattr(sys, "argv", ["app.py", *served])
    drawn = drawn_by("app._main()")
    assert not drawn.error and scores(drawn)[0] > 0.8
    assert app.BUNDLED_CAPTIONS not in [caption.value for caption in drawn.caption]


def test_options_reach_the_page(monkeypatch, served):
    asked = ["app", "--port", str(free_port()), "--options"]
    assert cli.main([*asked, "model.map_layer=0"]) == 2 and not served
    assert cli.main([*asked, "model.map_layer=2", "model.max_txt_len=6"]) == 0
    monkeypatch.setattr(sys, "argv", ["app.py", *served])
    (warning,) = drawn_by("app._main()").warning
    assert "only the first 4 of 9 words" in warning.value
    assert not shown().warning


def test_an_upload_waits_for_its_file():
    drawn = shown()
    drawn.radio("source").set_value(app.UPLOAD).run()
    assert not drawn.exception and not drawn.metric
    assert drawn.text_input("caption").value == ""
    drawn.radio("source").set_value(app.SCENE).run()
    assert not drawn.exception and drawn.text_input("caption").value and drawn.metric


def test_an_unreadable_upload_is_one_line_and_the_next_one_works(photo_bytes):
    drawn = shown()
    drawn.radio("source").set_value(app.UPLOAD).run()
    drawn.file_uploader("upload").set_value(("<b>.png", b"no image", "image/png")).run()
    (error,) = drawn.error
    assert error.value == r"\<b\>\.png\: no image of a known format" and not drawn.exception
    assert drawn.text_input("caption").label and drawn.text_input("query").label  # both tabs
    drawn.file_uploader("upload").set_value(("good.png", photo_bytes, "image/png")).run()
    drawn.text_input("caption").set_value("a red ring").run()
    assert not drawn.error and not drawn.exception and drawn.metric


@pytest.mark.parametrize("cls", [BlipITM, Blip2ITM])
def test_lavis_models_show_words_and_say_that_they_cannot_search(monkeypatch, cls):
    model = toy(cls)
    monkeypatch.setattr(app, "load_trained", lambda *_: Trained.of(model))
    drawn = shown(checkpoint=cls.__name__)  # a name of its own, as Streamlit keeps models by it
    assert len(scores(drawn)) == 2
    (error,) = drawn.error
    assert f"a {cls.__name__} can be explained" in error.value.replace("\\", "")


def test_a_folder_is_searched(tmp_path):
    for name in ("a.png", "[b](x).png"):
        Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no image")
    drawn = shown(str(tmp_path))
    assert sorted(text.value for text in drawn.text) == ["[b](x).png", "a.png"]
    assert any("1 more could not be read" in caption.value for caption in drawn.caption)
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside a file")
    assert readable_images(tmp_path, 1) == ([tmp_path / "[b](x).png"], 3)
    with pytest.raises(UserError, match="no readable image in .*empty"):
        (tmp_path / "empty").mkdir()
        readable_images(tmp_path / "empty", 9)
    with pytest.raises(UserError, match="no folder .*none"):
        readable_images(tmp_path / "none", 9)


def test_search_finds_the_scene_that_is_described(monkeypatch):
    monkeypatch.setattr("softmask_plugin.explain.gallery.BATCH", 16)
    scenes = make_scenes("test", 40)
    gallery = Gallery(load_trained(), (render(scene, 60) for scene in scenes))
    for wanted in (0, 17, 39):
        hits = gallery.search(captions(scenes[wanted])[0].text, count=3)
        assert hits[0].index == wanted and hits[0].rank == 1 and len(hits) == 3
        assert wrong_caption(scenes[wanted]) not in {c.text for c in captions(scenes[wanted])}


def test_text_is_escaped():
    assert app.plain("a:red[b] <i>`$x\n") == r"a\:red\[b\] \<i\>\`\$x\\n"
    assert app.plain("Größe _a_") == r"Größe \_a\_"
    words = ["a", "star", "a"]
    assert len({app._label(words, i) for i in range(3)}) == 3  # Streamlit needs unique labels


def test_a_taken_port_or_missing_folder_is_one_line(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind((app.ADDRESS, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["app", "--port", port]) == 2
        assert f"port {port} is taken" in capsys.readouterr().err
    for port in ("99999", "0", "-1"):
        assert cli.main(["app", f"--port={port}"]) == 2
        assert f"--port is {port}: it must be 1 to 65535" in capsys.readouterr().err
    assert cli.main(["app", "--images", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


def free_port():
    with socket.socket() as free:
        free.bind((app.ADDRESS, 0))
        return free.getsockname()[1]


@pytest.fixture
def address(tmp_path):
    """Address of a served page, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "softmask_plugin.cli", "app", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(app.Path(app.__file__).parents[2])},
            stdout=log,
            stderr=log,
        )
    url, patience = f"http://{app.ADDRESS}:{port}", time.monotonic() + 90
    try:
        while True:
            try:
                urlopen(f"{url}/_stcore/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < patience
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
def test_a_click_on_a_word_changes_picture_and_score(address):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(address)
        label, seen = tab.get_by_text(re.compile("Match with .* masked")), []
        for word in ("ring", "red", "small"):
            tab.get_by_role("radio", name=word, exact=True).or_(
                tab.get_by_role("button", name=word, exact=True)
            ).first.click(timeout=60000)
            tab.get_by_text(f"Match with “{word}” masked").wait_for(timeout=30000)
            tab.wait_for_timeout(1500)
            pictures = tab.locator("img").evaluate_all("all => all.map(one => one.src)")
            seen.append((label.inner_text(), pictures[1:3], pictures[0]))
        browser.close()
    # The scene stays; words have maps and masks of their own
    assert len({text for text, _, _ in seen}) == 3
    assert len({picture for _, maps, _ in seen for picture in maps}) == 6
    assert len({scene for *_, scene in seen}) == 1
