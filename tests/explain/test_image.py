"""softmask explain: the model of a checkpoint, words, figures, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shlex
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from PIL import Image

import softmask_plugin
from softmask_plugin import cli
from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError
from softmask_plugin.explain import trained
from softmask_plugin.explain.image import FOREIGN
from softmask_plugin.explain.pairs import explain
from softmask_plugin.explain.trained import Trained, load_trained
from softmask_plugin.models.matching import SoftMaskImageTextMatching
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.models.vqa import SoftMaskVqa
from softmask_plugin.registry import LOSSES

ARCH = "softmask_image_text_matching"
CAPTION = "A small red circle, above a large blue star!"
WORDS = "a small red circle above a large blue star".split()
ROOT = Path(__file__).parents[2]
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def save(model, folder, *, arch="softmask_pretrain", within=True, **section):
    """A checkpoint as a run writes it: with its configuration, and its vocabulary beside it."""
    config = {
        "model": {**OmegaConf.to_container(OmegaConf.structured(model.options)), "arch": arch},
        "datasets": {"mine": {"vis_processor": {"train": {"mean": MEAN, "std": STD}}}},
        "run": {},
    }
    config["model"] |= {"tokenizer": "gone.json", "pretrained": "gone.pth", **section}
    content = {"model": model.state_dict(), "optimizer": {}, "epoch": 0}
    torch.save(content | ({"config": config} if within else {}), folder / "checkpoint_0.pth")
    model.tokenizer.save_vocabulary(str(folder))
    OmegaConf.save(config, folder / "config.yaml")
    return folder / "checkpoint_0.pth"


@pytest.fixture
def checkpoint(make_model, tmp_path):
    return save(make_model(), tmp_path)


@pytest.mark.parametrize("within", [True, False])
def test_a_checkpoint_describes_its_own_model(make_model, tmp_path, photo, within):
    model = make_model()
    found = softmask_plugin.explain_image(photo, CAPTION, save(model, tmp_path, within=within))
    pixels = Image.open(photo).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(pixels)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    (expected,) = explain(model, pixels.permute(2, 0, 1)[None], [" ".join(WORDS)])
    assert found.words == WORDS and found.caption == " ".join(WORDS)
    assert found.score == pytest.approx(expected.score, abs=1e-6)
    torch.testing.assert_close(found.masks, expected.masks, atol=1e-4, rtol=1e-4)
    assert found.image.shape == (40, 60, 3)


@pytest.mark.parametrize("kind", ["path", "picture", "array"])
def test_every_kind_of_image_and_model(make_other, photo, kind):
    model = make_other(SoftMaskImageTextMatching)
    picture = Image.open(photo)
    image = {"path": photo, "picture": picture, "array": np.asarray(picture)}[kind]
    found = softmask_plugin.explain_image(image, CAPTION, model)
    again = softmask_plugin.explain_image(photo, CAPTION, Trained.of(model))
    assert torch.equal(found.cams, again.cams) and found.score == again.score


def test_a_model_has_the_processors_of_its_type(make_other):
    model = make_other(SoftMaskImageTextMatching)
    usual = Trained.of(model).image_processor.mean
    model.options.model_type = "small"
    assert list(Trained.of(model).image_processor.mean) == [0.5] * 3 != list(usual)
    model.options.model_type = "of my own"
    assert Trained.of(model).image_processor.mean == usual


def test_chosen_words_are_explained_at_every_place(make_model, photo):
    model = make_model()
    whole = softmask_plugin.explain_image(photo, CAPTION, model)
    found = softmask_plugin.explain_image(photo, CAPTION, model, words=["A", "Star!"])
    assert found.words == ["a", "a", "star"]
    assert torch.equal(found.cams, whole.cams[[0, 5, 8]])
    assert torch.equal(found.masked_scores, whole.masked_scores[[0, 5, 8]])
    (star,) = softmask_plugin.explain_image(photo, CAPTION, model, words="star").words
    assert star == "star"
    with pytest.raises(UserError, match="lacks 'cirle': did you mean 'circle'"):
        softmask_plugin.explain_image(photo, CAPTION, model, words=["cirle"])
    with pytest.raises(UserError, match="lacks '!'"):
        softmask_plugin.explain_image(photo, CAPTION, model, words=["!"])


@pytest.mark.parametrize(
    ("tokens", "limit"),
    [(12, "model.max_txt_len is 12"), (40, "its text processor's max_words is 30")],
)
def test_cutting_a_caption_is_logged_once(make_model, photo, caplog, tokens, limit):
    words = [*WORDS, *["star"] * 25]
    found = softmask_plugin.explain_image(photo, " ".join(words), make_model(max_txt_len=tokens))
    count = min(tokens - 2, 30)
    assert found.words == words[:count] and found.caption == " ".join(words)
    assert found.as_dict()["read"] == found.kept == " ".join(words[:count])
    message = f"only the first {count} of 34 words fit"
    assert caplog.messages == [f"{message} ({limit})"]
    assert found.table().splitlines()[0].endswith(f"{found.kept} ... ({message})")


def test_a_caption_that_fits_is_kept_whole(make_model, photo, caplog):
    found = softmask_plugin.explain_image(photo, CAPTION, make_model())
    assert found.kept == found.caption and not found.cut and not caplog.messages


def test_a_result_is_one_line_and_in_a_notebook_a_picture(make_model, photo):
    found = softmask_plugin.explain_image(photo, "a star", make_model())
    assert re.fullmatch(r"<match [01]\.\d{3}: 'a star', 2 words explained>", repr(found))
    assert Image.open(BytesIO(found._repr_png_())).format == "PNG"


def test_the_bundled_model_says_that_a_photo_is_foreign_to_it(make_model, photo, caplog):
    bundled = load_trained()
    for scene in make_scenes("test", 8):
        softmask_plugin.explain_image(render(scene, 60), captions(scene)[0].text, bundled)
    softmask_plugin.explain_image(photo, CAPTION, make_model())
    assert not caplog.messages
    scene = render(make_scenes("test", 1)[0], 224)
    for image, caption in ((photo, CAPTION), (scene, "a dog on a sofa"), (scene, "звезда")):
        softmask_plugin.explain_image(image, caption, bundled)
        assert caplog.messages == [FOREIGN]
        caplog.clear()
    assert load_trained("shipped:scenes_tiny").bundled


def test_a_checkpoint_cannot_make_itself_trusted(make_model, tmp_path):
    path = save(make_model(), tmp_path, trust_checkpoint=True, vit_weights="deit")
    options = load_trained(path).model.options
    assert options.trust_checkpoint is False
    assert load_trained(
        path, options=["model.trust_checkpoint=true"]
    ).model.options.trust_checkpoint


def test_bare_weights_of_lavis_albef(make_model, albef_twin, tmp_path, photo):
    model = make_model()
    twin = albef_twin(model).eval()
    torch.save({"model": twin.state_dict()}, tmp_path / "ALBEF.pth")
    options = [
        f"model.{key}={value}"
        for key, value in {
            "image_size": 32,
            "vit": "{patch_size: 8, width: 48, depth: 2, heads: 3}",
            "bert": "{width: 32, layers: 5, heads: 4, intermediate: 64, max_positions: 40, "
            "image_cls: true}",
            "embed_dim": 16,
        }.items()
    ]
    named = ("softmask_image_text_matching", "tiny", options)
    found = softmask_plugin.explain_image(
        photo, CAPTION, load_trained(tmp_path / "ALBEF.pth", *named)
    )
    assert found.score == pytest.approx(
        softmask_plugin.explain_image(photo, CAPTION, model).score, abs=1e-5
    )
    with pytest.raises(UserError, match="does not say .*: give --model .*Python arch and"):
        load_trained(tmp_path / "ALBEF.pth")


def test_arch_and_model_type_name_the_model_of_a_bare_checkpoint(photo, tmp_path):
    named = ("softmask_image_text_matching", "scenes_tiny")
    bare = tmp_path / "bare.pth"
    torch.save({"model": load_trained(None, *named).model.state_dict()}, bare)
    with pytest.raises(UserError, match="does not say which model it belongs to"):
        softmask_plugin.explain_image(photo, CAPTION, bare)
    with pytest.raises(UserError, match="no type of softmask_image_text_matching is given: .*tiny"):
        softmask_plugin.explain_image(photo, CAPTION, bare, arch=named[0])
    found = softmask_plugin.explain_image(photo, CAPTION, bare, arch=named[0], model_type=named[1])
    assert found.score == softmask_plugin.explain_image(photo, CAPTION).score


@pytest.mark.parametrize("kind", ["vqa", "lavis", "other"])
def test_a_model_without_a_matching_head_names_the_models_that_have_one(make_other, photo, kind):
    if kind == "vqa":
        model = make_other(SoftMaskVqa, bert={"layers": 8})
    else:
        model = {"lavis": BaseModel(), "other": {}}[kind]
    with pytest.raises(UserError, match="cannot be explained: .*softmask_image_text_matching"):
        softmask_plugin.explain_image(photo, CAPTION, model)


@pytest.mark.parametrize(
    "image",
    [np.random.rand(8, 8, 3), np.zeros((8, 8, 2), np.uint8), np.zeros((0, 8, 3), np.uint8), None],
)
def test_an_image_of_another_kind_is_refused(make_model, image):
    with pytest.raises(UserError, match="expected a PIL image or an array"):
        softmask_plugin.explain_image(image, CAPTION, make_model())


def test_weights_without_a_matching_head_are_refused(make_model, tmp_path):
    path = save(make_model(), tmp_path)
    content = torch.load(path, weights_only=True)
    content["model"] = {k: v for k, v in content["model"].items() if "itm_head" not in k}
    torch.save(content, path)
    with pytest.raises(UserError, match="has no matching head"):
        load_trained(path)


def test_the_bundled_model_is_the_default(photo, tmp_path):
    found = softmask_plugin.explain_image(photo, CAPTION)
    assert found.words == WORDS and found.cams.shape[1:] == (6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
        ({"model_type": "tiny"}, "give --model with --type"),
        ({"arch": "softmask_pretrian", "model_type": "tiny"}, "did you mean 'softmask_pretrain'"),
        ({"arch": "softmask_pretrain", "model_type": "tyni"}, "did you mean 'tiny'"),
        ({"arch": "softmask_vqa", "model_type": "tiny"}, "no model 'softmask_vqa' with a matching"),
        ({"arch": "softmask_pretrain", "model_type": "tiny"}, "comes without weights"),
        (
            {"arch": "softmask_pretrain", "model_type": "tiny", "options": ["run.seed=1"]},
            "section 'run'",
        ),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        load_trained(**arguments)


def test_a_checkpoint_of_a_model_without_a_matching_head(make_other, tmp_path):
    model = make_other(SoftMaskVqa, bert={"layers": 8})
    with pytest.raises(UserError, match="no model 'softmask_vqa' with a matching head"):
        load_trained(save(model, tmp_path, arch="softmask_vqa"))


def test_without_a_checkpoint_the_default_type_is_loaded(monkeypatch, make_model, tmp_path):
    path = save(make_model(), tmp_path)
    config = {"model": OmegaConf.load(tmp_path / "config.yaml").model, "preprocess": {}}
    config["model"] |= {"pretrained": str(path), "tokenizer": "scenes"}
    OmegaConf.save(config, tmp_path / "type.yaml")
    types = {"trained": str(tmp_path / "type.yaml")}
    monkeypatch.setattr(SoftMaskPretrain, "PRETRAINED_MODEL_CONFIG_DICT", types)
    monkeypatch.setattr(trained, "DEFAULT", ("softmask_pretrain", "trained"))
    assert isinstance(load_trained().model, SoftMaskPretrain)


# ---- the command


def command(photo, checkpoint, *more):
    given = ["explain", "--image", str(photo), "--caption", CAPTION]
    return cli.main([*given, "--checkpoint", str(checkpoint), *more])


def test_commands_use_a_gpu_if_there_is_one(photo, checkpoint, monkeypatch, capsys):
    def move(self, device):
        assert device == "cuda"
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    assert command(photo, checkpoint) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the GPU has too little memory" in line and "CUDA_VISIBLE_DEVICES= takes" in line


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_the_command_writes_figure_and_json(photo, checkpoint, tmp_path, capsys, suffix, start):
    figure, file = tmp_path / "new" / f"out{suffix}", tmp_path / "out.json"
    assert command(photo, checkpoint, "-o", str(figure), "--json", str(file)) == 0
    assert figure.read_bytes().startswith(start)
    found = json.loads(file.read_text())
    assert found["grid"] == [4, 4] and found["image_size"] == [40, 60]
    assert [each["word"] for each in found["words"]] == WORDS
    for each in found["words"]:
        assert np.shape(each["heat_map"]) == np.shape(each["soft_mask"]) == (4, 4)
        assert 0 <= each["masked_score"] <= 1
    out = capsys.readouterr().out
    assert f"match {found['score']:.3f}: {' '.join(WORDS)}" in out and str(figure) in out


def test_json_is_alone_on_standard_output(photo, checkpoint, tmp_path, capsys):
    more = ["-o", str(tmp_path / "a.svg"), "--word", "star", "--json"]
    assert command(photo, checkpoint, *more) == 0
    (word,) = json.loads(capsys.readouterr().out)["words"]
    assert word["word"] == "star"


def test_boxes_tell_own_from_other(photo, checkpoint, tmp_path, capsys):
    plain = softmask_plugin.explain_image(photo, CAPTION, checkpoint)
    heat = plain.cams[[WORDS.index(word) for word in ("blue", "star")]].mean(dim=0)
    y, x = divmod(int(heat.argmax()), 4)
    peak = f"{x / 4},{y / 4},{(x + 1) / 4},{(y + 1) / 4}"
    away = f"{(x + 1) % 4 / 4},{y / 4},{(x + 1) % 4 / 4 + 0.25},{(y + 1) / 4}"
    file = tmp_path / "a.json"
    for own, other, line in ((peak, away, "its own box"), (away, peak, "another's box")):
        boxes = ["--box", f"blue star={own}", "--box", f"red={other}"]
        assert (
            command(photo, checkpoint, "-o", str(tmp_path / "a.png"), *boxes, "--json", str(file))
            == 0
        )
        assert f"'blue star' peaks in {line} (chance 0.06)" in capsys.readouterr().out
        found = json.loads(file.read_text())["pointing"]["blue star"]
        assert found == {"own": float(own == peak), "other": float(own != peak), "chance": 1 / 16}
    for box, message in (
        ("red=0.5,0,0.2,1", "the box of 'red' is 0.5, 0, 0.2, 1: give left, top"),
        ("red=0,1", "give a phrase and four numbers"),
        ("heart=0,0,1,1", "the cleaned caption lacks 'heart'"),
    ):
        assert command(photo, checkpoint, "--box", box) == 2
        assert message in capsys.readouterr().err


def test_chosen_words_may_leave_out_a_phrase_with_boxes(photo, checkpoint):
    """It is shown all the same, with all of its boxes."""
    boxes = {"blue star": [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)]}
    whole = softmask_plugin.explain_image(photo, CAPTION, checkpoint, boxes=boxes)
    found = softmask_plugin.explain_image(photo, CAPTION, checkpoint, "red", boxes=boxes)
    assert found.words == ["red", "blue", "star"] and found.named[0].words == [1, 2]
    assert found.pointing() == whole.pointing()
    frames = [each for axes in found.figure().axes for each in axes.patches]
    plain = softmask_plugin.explain_image(photo, CAPTION, checkpoint, ["red", "blue star"])
    without = [each for axes in plain.figure().axes for each in axes.patches]
    # Two boxes on the map and the mask of two words, each light and dark
    assert len(frames) - len(without) == 2 * 2 * 2 * 2
    for one in ((0, 0, 0.5, 0.5), np.array([0, 0, 0.5, 0.5])):
        alone = softmask_plugin.explain_image(photo, CAPTION, checkpoint, boxes={"blue star": one})
        assert alone.named[0].boxes == [(0, 0, 0.5, 0.5)]
    for boxes, message in (([], "no box is given for 'red'"), ((0, 0, 1), "give its four sides")):
        with pytest.raises(UserError, match=message):
            softmask_plugin.explain_image(photo, CAPTION, checkpoint, boxes={"red": boxes})


def test_a_figure_has_the_given_width(photo, checkpoint, tmp_path, capsys):
    for width, pixels in (("3.3", 990), ("7", 2100)):
        figure = tmp_path / "a.png"
        assert command(photo, checkpoint, "-o", str(figure), "--width", width) == 0
        assert Image.open(figure).width == pixels
    found = softmask_plugin.explain_image(photo, CAPTION, checkpoint)
    assert Image.open(found.save(tmp_path / "b.png", width=3)).width == 900


def test_the_same_pair_gives_the_same_file(photo, checkpoint, tmp_path):
    files = [tmp_path / "a.pdf", tmp_path / "b.pdf"]
    for file in files:
        command(photo, checkpoint, "-o", str(file))
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("-o", "a.gif"), "must end with .png, .pdf, .svg"),
        (("--image", "a.png", "-o", "./a.png"), "a.png would be overwritten: name another file"),
        (("--word", "sta"), "did you mean 'star'"),
        (("--image", "none.jpg"), "error: none.jpg: No such file or directory"),
        (("--image", "."), "error: .: not a regular file"),
        (("--width", "0.5"), "the figure's width is 0.5: it must be 2 to 40 inches"),
        (("--width", "nan"), "the figure's width is nan: it must be 2 to 40 inches"),
        (("--caption", ""), "the caption '' has no word to explain"),
        (("--caption", "!!!"), "the caption '!!!' has no word to explain"),
        (
            ("--json", "no/such/folder.json"),
            "no/such/folder.json: No such file or directory: check the path",
        ),
        (("--options", "model.image_sise=32"), "did you mean 'image_size'"),
    ],
)
def test_a_mistake_gets_one_line(photo, checkpoint, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert command(photo, checkpoint, *more) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0] and "Errno" not in error[0]
    assert not (tmp_path / "explanation.png").exists() or "--json" in more


def test_a_file_of_captions_is_explained_pair_by_pair(photo, checkpoint, tmp_path, capsys, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    table = [{"image": "photo.png", "caption": ["a star", "a red circle"]}]
    table += [{"image": name, "caption": "a ring"} for name in ("broken.png", "none.png")]
    (tmp_path / "captions.json").write_text(json.dumps(table))
    given = ["--captions", str(tmp_path / "captions.json"), "--images", str(tmp_path)]
    given += ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert cli.main(["explain", *given]) == 0
    assert f"2 pairs explained, 2 left out: {tmp_path / 'out'}" in capsys.readouterr().out
    assert [m.split(":")[0] for m in caplog.messages] == ["left out"] * 2
    lines = (tmp_path / "out" / "explanations.jsonl").read_text().splitlines()
    for line, caption in zip(map(json.loads, lines), ("a star", "a red circle"), strict=True):
        found = softmask_plugin.explain_image(photo, caption, checkpoint)
        assert line["image"] == "photo.png" and line["caption"] == caption
        assert line["score"] == pytest.approx(found.score)
        assert Image.open(tmp_path / "out" / line["figure"]).format == "PNG"

    (tmp_path / "captions.json").write_text(json.dumps(table[1:]))
    for more, message in (
        ([], "no image of .*captions.json can be read in .*: give their folder"),
        (["--word", "ring"], "give --image and --caption; or only --captions, --images"),
        (["--images", "none"], "no folder none: give the folder of the images"),
    ):
        assert cli.main(["explain", *given, *more]) == 2
        assert re.search(message, capsys.readouterr().err)


# ---- what README shows


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone, to run README's commands in."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snippets(file, mention):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S)
    return [block for block in blocks if mention in block]


def test_the_scene_of_the_examples_comes_from_its_seed():
    shipped = np.asarray(Image.open(ROOT / "examples" / "scene.png"), dtype=int)
    (scene,) = make_scenes("test", 1)
    assert abs(shipped - np.asarray(render(scene, 224))).max() <= 2
    for file in ("README.md", "examples/README.md"):
        assert captions(scene)[0].text in (ROOT / file).read_text(encoding="utf-8")


def test_the_explain_command_of_readme(clone, capsys):
    (line,) = re.findall(r"^softmask (explain .*)$", (ROOT / "README.md").read_text(), re.M)
    assert cli.main(shlex.split(line, comments=True)) == 0
    score = re.search(r"match ([\d.]+): ", capsys.readouterr().out)
    assert float(score[1]) > 0.9 and (clone / "words.png").is_file()


@pytest.mark.parametrize("file", ["README.md", "docs/explain.md"])
def test_the_python_of_the_guides(clone, file):
    (snippet,) = snippets(file, "explain_image")
    names = {}
    exec(snippet, names)
    assert names["result"].score > 0.9 and (clone / "words.pdf").is_file()


def test_the_loss_of_one_s_own_in_the_guides():
    (snippet,) = snippets("docs/method.md", "register_loss")
    names = {"__name__": "a_user_s_script"}
    exec(snippet, names)
    assert LOSSES.pop("my_itc") is names["MyLoss"]
