"""The truth about texts on scenes, found without the code that wrote them."""

import math
import re

import numpy as np

from softmask_plugin.datasets.scenes.grammar import COLOURS, SHAPES

HELDOUT = 0.125  # share of the compositions that training never shows
DIRECTIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
NOUN = rf"(?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|thing)"


def things_called(noun, things):
    """All things that fit "red circle", "large thing", ..."""
    size, colour, shape = re.fullmatch(NOUN, noun).groups()
    wanted = {"size": size, "colour": colour, "shape": None if shape == "thing" else shape}
    return [t for t in things if all(v in (None, getattr(t, k)) for k, v in wanted.items())]


def lies(thing, how, anchor):
    """Whether a thing is within 45 degrees of a direction, seen from another."""
    way = np.array([thing.x - anchor.x, thing.y - anchor.y])
    return way @ DIRECTIONS[how] > math.cos(math.pi / 4) * np.linalg.norm(way)


def meant(expression, things):
    """All things that fit "the red circle" or "the thing above the red circle", and the anchor."""
    related = re.fullmatch(rf"the thing ({'|'.join(DIRECTIONS)}) the (.+)", expression)
    if related is None:
        return things_called(expression.removeprefix("the "), things), None
    (anchor,) = things_called(related[2], things)
    return [t for t in things if t is not anchor and lies(t, related[1], anchor)], anchor


def hidden_by(curtain, things):
    """The one thing behind a curtain that touches no other."""
    (x0, y0, x1, y1), behind = curtain, []
    for thing in things:
        a0, b0, a1, b1 = thing.box
        if x0 <= a0 and y0 <= b0 and a1 <= x1 and b1 <= y1:
            behind.append(thing)
        else:
            assert a1 <= x0 or x1 <= a0 or b1 <= y0 or y1 <= b0
    (thing,) = behind
    return thing


def entailment_label(item):
    expression, value = re.fullmatch(r"(the .+) is (?:an? )?(\w+)", item["sentence"]).groups()
    (scene,) = item["scenes"]
    (thing,), anchor = meant(expression, scene.things)
    hidden = hidden_by(item["curtain"], scene.things)
    assert anchor is not hidden
    if thing is hidden:
        return "neutral"
    assert value in COLOURS or value in SHAPES
    return "entailment" if value in thing.composition else "contradiction"


def nouns(text):
    """The things that a statement or question names with an article."""
    return [match[0].partition(" ")[2] for match in re.finditer(rf"\ban? {NOUN}", text)]


def pair_truth(item):
    """Whether a statement about two images is true."""
    text = item["sentence"]
    shown = [
        [bool(things_called(noun, scene.things)) for noun in nouns(text)]
        for scene in item["scenes"]
    ]
    (left, *left_second), (right, *right_second) = shown
    if text.startswith("both images show"):
        return left and right
    if text.startswith("only one image shows"):
        return left != right
    (left_second,), (right_second,) = left_second, right_second
    if text.startswith("one image shows"):
        return (left and right_second) or (right and left_second)
    assert text.startswith("the left image shows")
    return left and right_second


def answer(question):
    """The answer to a question."""
    (scene,), text = question["scenes"], question["question"]
    things = scene.things
    if asked := re.fullmatch(r"what (colour|shape|size) is (.+)", text):
        (thing,), _ = meant(asked[2], things)
        return getattr(thing, asked[1])
    if asked := re.fullmatch(r"how many (.+) are there", text):
        return str(len(things_called(asked[1].removesuffix("s"), things)))
    (noun,) = nouns(re.fullmatch(r"is there (.+)", text)[0])
    return "yes" if things_called(noun, things) else "no"


def caption_truth(text, things):
    """Whether a caption that names things by size, colour and shape is true."""
    where = "|".join(DIRECTIONS)
    parsed = re.fullmatch(rf"an? ({NOUN})(.+)", text)
    first, told = things_called(parsed[1], things), parsed[5]
    related = re.findall(rf" (?:and )?({where}) an? ((?:\w+ ){{2}}\w+)", told)
    assert sum(len(how) + len(noun) for how, noun in related) > 0.7 * len(told)
    return bool(first) and all(
        any(lies(first[0], how, thing) for thing in things_called(noun, things))
        for how, noun in related
    )
