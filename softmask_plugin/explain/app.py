"""``softmask app``: a page to click a word and see where the model looks and what a mask does."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import streamlit as st
from PIL import Image
from streamlit.web import bootstrap

from softmask_plugin.datasets.images import open_rgb
from softmask_plugin.datasets.scenes.grammar import Scene, captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError, one_line
from softmask_plugin.explain.figure import heat_overlay, soft_masked
from softmask_plugin.explain.gallery import Gallery, readable_images, wrong_caption
from softmask_plugin.explain.image import explain_image
from softmask_plugin.explain.pairs import Explanation
from softmask_plugin.explain.trained import Trained, load_trained

ADDRESS = "127.0.0.1"  # others on the network see the page only if the user forwards it
SCENES = 200  # held-out scenes to look at and to search
UPLOAD_MB = 10
SEARCHED = 2000  # images of a folder, at most
SHOWN = 420  # longest side of a picture on the page, pixels
SCENE, UPLOAD = "A rendered scene", "Your own image"
HELP = """
**Match** is the model's probability that the caption describes the image. Click a word:

- The **heat map** shows where the model looks for it, brightest where it looks most.
- The **soft mask** dims just those patches: the darker a patch, the less the model sees of it.
- The second number is the match **with the mask on**.

Training does this to one word of each caption, and the pair must still match. A model that was
trained so with wrong captions too (`soft_mask.negatives`, as the bundled one) has learnt to match
without the masked patches, and its match hardly moves. Without wrong captions, it takes the mask
for a sign of a match, and the match rises. In a model trained without the mask, a fall says that
the match relied on the masked patches.
"""
BUNDLED = """
The bundled tiny model tells true captions from wrong ones well. The heat maps of its words for
colours and shapes are brightest on the object that they name in about nine of ten cases.
"""
BUNDLED_CAPTIONS = (
    "The bundled tiny model was trained on captions about two objects, such as “a red ring above a "
    "blue star”. For a caption about one object the match is low."
)
BUNDLED_IMAGES = (
    "The bundled tiny model was trained on rendered scenes. For a photo its match means nothing."
)


class Weights(NamedTuple):
    """Arguments of ``load_trained``; by default the bundled model."""

    checkpoint: str | None = None
    arch: str | None = None
    model_type: str | None = None
    options: Sequence[str] = ()


def serve(weights: Weights, images: str | None, port: int) -> None:
    """Serve the page until the process is interrupted.

    Args:
        images: Folder that the second tab searches; None: rendered scenes.

    Raises:
        UserError: The port is out of range or taken, or the model or the folder cannot be used.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}: it must be 1 to 65535")
    load_trained(*weights)
    if images is not None:
        readable_images(Path(images), limit=1)
    with socket.socket() as probe:
        if probe.connect_ex((ADDRESS, port)) == 0:
            raise UserError(f"port {port} is taken: choose another one with --port")
    flags = {
        "server.address": ADDRESS,
        "server.port": port,
        "server.headless": True,  # opens no browser and asks for no e-mail
        "server.maxUploadSize": UPLOAD_MB,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
    }
    bootstrap.load_config_options(flags)
    bootstrap.run(__file__, False, [json.dumps([weights, images])], flags)


def page(weights: Weights, images: str | None = None) -> None:
    """Draw the page; Streamlit calls this again at every click."""
    st.set_page_config("softmask: what the mask hides", "🔍", layout="wide")
    st.header("See what the mask hides", anchor=False)
    look, search = st.tabs(["Look at words", "Search by text"])
    with look, _one_line():
        _look(weights)
    with search, _one_line():
        _search(weights, images)


@contextmanager
def _one_line() -> Iterator[None]:
    """Show a mistake as one line, and go on with the rest of the page."""
    try:
        yield
    except UserError as error:
        st.error(plain(str(error)))


def plain(text: str) -> str:
    """Escape a text so that Markdown shows it as it is; file names and captions hold anything."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", one_line(text))


@st.cache_resource(show_spinner="Loading the model ...")
def _trained(weights: Weights) -> Trained:
    return load_trained(*weights).on_gpu()


@st.cache_resource
def _scenes() -> list[Scene]:
    return make_scenes("test", SCENES)


@st.cache_data(max_entries=64, show_spinner=False)
def _explained(weights: Weights, image: Image.Image, caption: str) -> Explanation:
    found = explain_image(image, caption, _trained(weights))
    return replace(found, image=found.image[:1, :1])  # the cache would keep it at full size


@st.cache_resource(show_spinner="Encoding the images ...")
def _gallery(weights: Weights, images: str | None) -> tuple[Gallery, list[Path], int]:
    trained = _trained(weights)
    if images is None:
        size = trained.matcher.image_size
        return Gallery(trained, (render(scene, size) for scene in _scenes())), [], 0
    files, left_out = readable_images(Path(images), SEARCHED)
    return Gallery(trained, map(open_rgb, files)), files, left_out


# ---- first tab


def _look(weights: Weights) -> None:
    left, right = st.columns([1, 2], gap="large")
    with left:
        source = st.radio(
            "Image", (SCENE, UPLOAD), key="source", horizontal=True, on_change=_set_caption
        )
        image = picture = None
        with _one_line():
            image, picture = _scene(weights) if source == SCENE else _uploaded(weights)
        if picture is not None:
            st.image(picture, width="stretch")
        st.markdown(HELP + (BUNDLED if _trained(weights).bundled else ""))
    with right:
        caption = _caption(source == SCENE)
        if _trained(weights).bundled:
            st.caption(BUNDLED_CAPTIONS)
        if image is None:
            st.info("Choose an image on the left. It stays on this computer.")
        elif not _trained(weights).text_processor(caption):
            st.info("Type what the image shows, then press Enter.")
        else:
            _show(_explained(weights, image, caption), np.asarray(picture) / 255)


def _scene(weights: Weights) -> tuple[Image.Image, Image.Image]:
    """Let the user choose a scene; returns it as the model sees it, and larger to be shown."""
    number, more = st.columns([2, 1], vertical_alignment="bottom")
    number.number_input("Scene", 1, SCENES, key="scene", on_change=_set_caption)
    more.button("Next scene", on_click=_next_scene, width="stretch")
    scene = _scenes()[st.session_state.scene - 1]
    return render(scene, _trained(weights).matcher.image_size), render(scene, SHOWN)


def _uploaded(weights: Weights) -> tuple[Image.Image | None, Image.Image | None]:
    """Let the user upload an image; returns it at full size, and smaller to be shown."""
    file = st.file_uploader(f"An image, up to {UPLOAD_MB} MB", key="upload")
    if _trained(weights).bundled:
        st.caption(BUNDLED_IMAGES)
    if file is None:
        return None, None
    if file.size > UPLOAD_MB * 2**20:
        raise UserError(f"{file.name} has more than {UPLOAD_MB} MB: choose a smaller image")
    image = open_rgb(file.name, data=file.getvalue())
    return image, _small(image)


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SHOWN, SHOWN))
    return small


def _caption(of_scene: bool) -> str:
    if "caption" not in st.session_state:
        _set_caption()
    text, true, wrong = st.columns([4, 1, 1], vertical_alignment="bottom")
    if of_scene:
        true.button("True one", on_click=_set_caption, width="stretch")
        wrong.button("Wrong one", on_click=_set_caption, args=(False,), width="stretch")
    return text.text_input("Caption", key="caption", max_chars=200)


def _set_caption(true: bool = True) -> None:
    state = st.session_state
    state.caption = ""
    if state.source == SCENE:
        scene = _scenes()[state.get("scene", 1) - 1]  # lost while another image is shown
        state.caption = captions(scene)[0].text if true else wrong_caption(scene)


def _next_scene() -> None:
    st.session_state.scene = st.session_state.scene % SCENES + 1
    _set_caption()


def _show(found: Explanation, picture: np.ndarray) -> None:
    if found.cut:
        st.warning(f"The caption is too long for the model: {found.cut}.")
    word = st.pills(
        "Click a word",
        range(len(found.words)),
        default=found.content_words[-1] if found.content_words else 0,
        format_func=lambda index: _label(found.words, index),
        key=f"words of {found.caption}",
    )
    if word is None:
        return
    name, masked = plain(found.words[word]), float(found.masked_scores[word])
    before, after = st.columns(2)
    before.metric("Match", f"{found.score:.2f}", border=True, height="stretch")
    after.metric(
        f"Match with “{name}” masked",
        f"{masked:.2f}",
        f"{masked - found.score:+.2f}",
        delta_color="off" if abs(masked - found.score) < 0.005 else "normal",
        border=True,
    )
    heat, mask = st.columns(2)
    heat.image(heat_overlay(picture, found.cams[word].numpy()), width="stretch")
    heat.caption(f"Heat map of “{name}”: bright is where the model looks")
    mask.image(soft_masked(picture, found.masks[word].numpy()), width="stretch")
    mask.caption(f"{found.mask_name.capitalize()}: dark is what it hides from the model")


def _label(words: list[str], index: int) -> str:
    """A word to click. Streamlit needs unique labels, so repeated words gain invisible spaces."""
    return plain(words[index]) + "\u200b" * words[:index].count(words[index])


# ---- second tab


def _search(weights: Weights, images: str | None) -> None:
    query = st.text_input(
        "What to look for", "a red heart above a blue diamond", key="query", max_chars=200
    )
    gallery, files, left_out = _gallery(weights, images)
    place = f"{SCENES} rendered scenes" if images is None else f"{len(files)} images"
    st.caption(
        f"{place}: the similarity of text and image proposes candidates, which are ranked as in "
        "the evaluation of the model's run, by default by matching head (ITM) and similarity."
        + (f" {left_out} more could not be read or are too many." if left_out else "")
    )
    if not _trained(weights).text_processor(query):
        return
    columns = [*st.columns(4), *st.columns(4)]
    for column, hit in zip(columns, gallery.search(query, len(columns)), strict=False):
        if images is None:
            scene = _scenes()[hit.index]
            picture, name = render(scene, SHOWN), captions(scene)[0].text
        else:
            file = files[hit.index]
            picture = _small(open_rgb(file, min_side=SHOWN))
            name = one_line(str(file.relative_to(images)))
        column.image(picture, width="stretch")
        column.text(name)
        column.caption(
            f"match {hit.match:.2f}, similarity {hit.similarity:+.2f} (rank {hit.rank} by it)"
        )


def _main() -> None:
    # Streamlit adds this file's folder, whose modules would shadow others of the same name.
    sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]
    weights, images = json.loads(sys.argv[1])  # as serve() passed them
    page(Weights(*weights), images)


if __name__ == "__main__":
    _main()
