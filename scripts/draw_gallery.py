"""Draw docs/gallery: LAVIS's own ALBEF, BLIP and BLIP-2, explained by every method.

    python scripts/draw_gallery.py [--steps 120]   # or: make gallery

LAVIS's weights are too large to be trained here. So each model is built small by LAVIS's classes,
starts from the bundled model where their weights have the same shape, and learns on rendered scenes
to tell a caption from another scene's and from one with a word changed; minutes on one core. Then
each method maps the words of held-out scenes: a picture of one scene, and in gallery.json how often
maps peak on the named thing and on the other one, and how deletion and insertion rank the patches.
"""

from __future__ import annotations

import softmask_plugin  # noqa: F401  (first: it lets LAVIS import)

# isort: split
import argparse
import json
import random
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from benchmarks.baseline import bert_config, encoders
from benchmarks.lavis_models import lavis_model
from softmask_plugin import load_trained
from softmask_plugin.datasets.scenes.grammar import Scene, captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.explain import WordCam, deletion_insertion
from softmask_plugin.explain.figure import heat_overlay
from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.matcher import Matcher, Pairs
from softmask_plugin.models.rerank import progress_bar
from softmask_plugin.pointing import own_and_other
from softmask_plugin.style import INK, STYLE
from softmask_plugin.tokenization import Captions

FOLDER = Path("docs/gallery")
MODELS = {"albef": AlbefPretrain, "blip": BlipITM, "blip2": Blip2ITM}
METHODS = {
    "albef": ("gradcam", "attention", "word", "occlusion"),
    "blip": ("gradcam", "attention", "occlusion"),
    "blip2": ("gradcam", "attention", "occlusion"),
}
TRAINED, TESTED, SCENES = 1200, 24, 8  # scenes to learn from, to point at, and to delete from
BATCH, RATE, STEPS = 32, 1e-3, 6


def main() -> None:
    """Train, measure and draw each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    bundled = load_trained()
    train, test = make_scenes("train", TRAINED), make_scenes("test", TESTED)
    images = torch.stack([bundled.image_processor(render(scene, 60)) for scene in test])
    states = None
    found: dict[str, Any] = {"steps": steps}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, cls in MODELS.items():
        torch.manual_seed(0)
        model = build(cls, bundled.model)
        if states is None:  # of the image encoder, which all share and none trains
            with torch.no_grad():
                pixels = (bundled.image_processor(render(scene, 60)) for scene in train)
                states = torch.cat([*map(model.visual_encoder, torch.stack([*pixels]).split(100))])
        start = time.perf_counter()
        accuracy = learn(matcher_of(model), states, train, steps)
        seconds = round(time.perf_counter() - start)
        maps = draw(name, model.eval(), test, images)
        found[name] = {"accuracy": accuracy, "seconds": seconds}
        found[name] |= {key: measure(model, test, images, each) for key, each in maps.items()}
        print(name, json.dumps(found[name], indent=1), flush=True)
        (FOLDER / "gallery.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def build(cls: Any, bundled: Any) -> Any:
    """One of LAVIS's classes in the bundled model's shape, with its weights where they fit."""
    vision, _ = encoders(bundled, lambda *_, **__: None)
    model = lavis_model(cls, vision, bert_config(bundled.bert.shape))
    known, own = bundled.state_dict(), model.state_dict()
    first = bundled.bert.shape.fusion_layer
    for key in own:
        source = key.replace("Qformer.bert.", "text_encoder.bert.").replace("_query", "")
        source = source.replace("text_encoder.", "text_encoder.bert.").replace("bert.bert", "bert")
        source = source.replace("text_encoder.bert.cls", "text_encoder.cls")
        if "crossattention" in key:  # those of the bundled model's fusion layers in turn
            layer = int(source.split("layer.")[1].split(".")[0])
            turn = first + (layer // 2 if cls is Blip2ITM else layer % 2)
            source = source.replace(f"layer.{layer}.", f"layer.{turn}.")
        if own[key].ndim and source in known:
            fits = known[source][: len(own[key])]
            if fits.shape[1:] == own[key].shape[1:]:
                own[key][: len(fits)] = fits
    model.load_state_dict(own)
    model.visual_encoder.requires_grad_(False)
    if cls is Blip2ITM:
        model.ln_vision.requires_grad_(False)
    return model


def learn(matcher: Matcher, states: Tensor, scenes: list[Scene], steps: int) -> float:
    """Train a model to match and, if it has an MLM head, to predict words.

    Returns:
        Share of the last 20 steps' pairs that it classified correctly.
    """
    model, draw, right = matcher.model.train(), random.Random(0), []
    texts = [[each.text for each in captions(scene)] for scene in scenes]
    if isinstance(model, Blip2ITM):
        states = model.ln_vision(states)
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.02)
    for step in progress_bar(range(steps), desc=type(model).__name__):
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 20) * (1 - step / steps)
        chosen = [draw.randrange(len(scenes)) for _ in range(BATCH)]
        own = matcher.tokenize([draw.choice(texts[i]) for i in chosen])
        changed = matcher.caption_tokenizer.change_words(own, own.ids)
        ids = torch.cat([own.ids, own.ids.roll(1, 0), changed])
        mask = torch.cat([own.mask, own.mask.roll(1, 0), own.mask])
        tokens = Captions(ids, own.packing.of(mask), torch.cat([own.words] * 3))
        owners = torch.arange(BATCH).repeat(3)
        pairs = Pairs(tokens, matcher.read(tokens), states[chosen], 6, owners)
        logits = matcher.match(pairs)
        unchanged = (changed == own.ids).all(dim=1)  # captions without a word to change
        truth = torch.cat([torch.ones(BATCH), torch.zeros(BATCH), unchanged]).long()
        loss = F.cross_entropy(logits, truth, torch.tensor([1.0, 2.0]))
        if isinstance(model, AlbefPretrain):
            rows = torch.arange(BATCH)
            word = (torch.rand(BATCH) * (own.words.amax(dim=1) + 1)).long()
            hidden = own.words == word[:, None]
            less = matcher.hide(pairs, hidden, rows)
            predicted = matcher.predict(less, hidden, torch.ones(BATCH, states.shape[1]))
            loss = loss + F.cross_entropy(predicted, own.ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        right.append((logits.argmax(dim=1) == truth).float().mean().item())
    return round(float(np.mean(right[-20:])), 3)


def draw(name: str, model: Any, scenes: list[Scene], images: Tensor) -> dict[str, Tensor]:
    """Map all words by every method, and draw those of one scene."""
    texts, maps = [captions(scene)[0].text for scene in scenes], {}
    for method in METHODS[name]:
        with WordCam(model, method=method) as cam:  # type: ignore[arg-type]
            maps[method] = cam(images, texts)
    scene, picture = scenes[0], np.asarray(render(scenes[0], 180)) / 255
    words = [each for each in captions(scene)[0].boxes if each[2] in ("colour", "shape")]
    split = texts[0].split()
    with mpl.rc_context(STYLE):
        rows, columns = len(maps), len(words)
        figure = Figure(figsize=(1.1 * columns + 0.9, 1.1 * rows + 0.6))
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (word, _, _) in zip(grid[0], words, strict=True):
            axes.set_title(split[word], loc="center", color=INK)
        for (method, heat), line in zip(maps.items(), grid, strict=True):
            for axes, (word, (x0, y0, x1, y1), _) in zip(line, words, strict=True):
                axes.imshow(heat_overlay(picture, heat[0, word].numpy()), extent=(0, 1, 1, 0))
                frame = {"fill": False, "ec": "white", "lw": 1}
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **frame))
                axes.set(xticks=[], yticks=[])
            line[0].set_ylabel(method, color=INK)
        figure.suptitle(texts[0], color=INK, size=9)
        figure.tight_layout(pad=0.4)
        figure.savefig(content := BytesIO(), dpi=110)
    Image.open(content).convert("RGB").quantize(96).save(FOLDER / f"{name}.png", optimize=True)
    return maps | {"random": torch.rand(maps["gradcam"].shape)}


def measure(model: Any, scenes: list[Scene], images: Tensor, maps: Tensor) -> dict[str, float]:
    """Where maps of words for colours and shapes peak, and areas of deletion and insertion by the
    mean of a caption's maps."""
    samples = []
    for scene, heat in zip(scenes, maps.numpy(), strict=True):
        for word, box, role in captions(scene)[0].boxes:
            others = [thing.box for thing in scene.things if thing.box != box]
            if role in ("colour", "shape"):
                samples.append((heat[word], box, others))
    pointed = own_and_other(samples)
    texts = [captions(scene)[0].text for scene in scenes[:SCENES]]
    whole = maps[:SCENES] / maps[:SCENES].amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    curves = deletion_insertion(model, images[:SCENES], texts, whole.sum(dim=1), STEPS)
    deletion, insertion = (round(each.mean().item(), 3) for each in curves.areas)
    shares = {key: round(pointed[key], 3) for key in ("own", "other")}
    return {**shares, "deletion": deletion, "insertion": insertion}


if __name__ == "__main__":
    main()
