"""What can be asked of scenes: entailment, two-image statements, questions, referring expressions.

Each function makes one item of what it is given and of nothing else: its draws are seeded by the
scene's ``texture``. Whether it says the truth follows from the scene; the words alone give nothing
away, for right and wrong statements are drawn alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np

from softmask_plugin.datasets.scenes.grammar import (
    COLOURS,
    GAP,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Box,
    Composition,
    Scene,
    Thing,
    article,
    relation,
)

ANSWERS = (*COLOURS, *SHAPES, *SIZES, "yes", "no", *map(str, range(MAX_OBJECTS + 1)))
KINDS = ("colour", "shape", "size", "exists", "count")  # of questions
CONTRADICTION, NEUTRAL, ENTAILMENT = "contradiction", "neutral", "entailment"

# Statements about two compositions, of which each image shows one; then which of them the left and
# the right image show where the statement is true, and where it is false. Who sees one image only
# is right about the first 75% of the time, 50%, 50% and 83%.
_PAIR_STATEMENTS = (
    ("both images show {0}", ((0, 0),), ((0, 1), (1, 0))),
    ("only one image shows {0}", ((0, 1), (1, 0)), ((0, 0), (1, 1))),
    ("one image shows {0} and the other {1}", ((0, 1), (1, 0)), ((0, 0), (1, 1))),
    ("the left image shows {0} and the right image {1}", ((0, 1),), ((1, 0), (0, 0), (1, 1))),
)

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Reference:
    """Words that fit one thing of a scene alone; ``anchor``: the thing that they start from."""

    text: str
    thing: Thing
    anchor: Thing | None = None


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A statement about a scene, part of which an opaque curtain hides.

    The label is ``"contradiction"``, ``"neutral"`` or ``"entailment"``; the curtain (x0, y0, x1,
    y1) in [0, 1].
    """

    scene: Scene
    curtain: Box
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A statement about two images, and whether it is true."""

    left: Scene
    right: Scene
    text: str
    label: bool


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene, its answer (one of ANSWERS) and its kind (one of KINDS)."""

    scene: Scene
    text: str
    answer: str
    kind: str


def references(things: Sequence[Thing], secret: str | None = None) -> list[Reference]:
    """All expressions that fit one of the things and no other.

    They are "the small red circle" with one to three of its words ("the red thing" where the shape
    is not said), and "the thing above the red circle".

    Args:
        things: what the scene shows.
        secret: ``"colour"``, ``"shape"`` or ``"size"``: what is not to be said of the thing meant.
    """
    attributes = [name for name in ("size", "colour", "shape") if name != secret]
    subsets = [told for n in range(len(attributes)) for told in combinations(attributes, n + 1)]
    found = []
    for told in subsets:
        texts = [_name(thing, told) for thing in things]
        pairs = zip(texts, things, strict=True)
        found += [Reference(text, thing) for text, thing in pairs if texts.count(text) == 1]
    for anchor in things:
        others = [thing for thing in things if thing is not anchor]
        where = [relation(thing, anchor) for thing in others]
        found += [
            Reference(f"the thing {how} {_name(anchor, ('colour', 'shape'))}", thing, anchor)
            for how, thing in zip(where, others, strict=True)
            if where.count(how) == 1
        ]
    return found


def refer(scene: Scene) -> Reference:
    """A referring expression, half of the time by a relation: "the thing above the red circle"."""
    return _pick_reference(_rng(scene), references(scene.things))


def entail(scene: Scene, pool: Sequence[Composition]) -> Hypothesis:
    """Say of one thing which colour or shape it has, and draw a curtain over one thing.

    "The circle is red" is entailed or contradicted where the circle is seen, and neutral where it
    is behind the curtain: then nobody can tell. The thing meant and the label are drawn before the
    curtain, so that the picture without the words gives nothing away either.

    Args:
        scene: of two or more things; from three on, some are meant by their relation to another.
        pool: compositions that may be stated, rightly or wrongly.
    """
    rng = _rng(scene)
    spare = len(scene.things) > 2  # to hide one beside the thing meant and its anchor
    described = {
        secret: [r for r in references(scene.things, secret) if spare or r.anchor is None]
        for secret in ("colour", "shape")
    }
    secret = _pick(rng, [secret for secret, found in described.items() if found])
    meant = _pick_reference(rng, described[secret])
    label = _pick(rng, (CONTRADICTION, NEUTRAL, ENTAILMENT))
    spoken_of = (meant.thing, meant.anchor)
    hidden = meant.thing
    if label != NEUTRAL:
        hidden = _pick(rng, [thing for thing in scene.things if thing not in spoken_of])

    right = getattr(meant.thing, secret)
    if secret == "colour":
        values = [colour for colour, shape in pool if shape == meant.thing.shape]
    else:
        values = [shape for colour, shape in pool if colour == meant.thing.colour]
    wrong = [value for value in values if value != right]
    seen = {getattr(thing, secret) for thing in scene.things if thing is not hidden}
    said = {
        ENTAILMENT: right,
        NEUTRAL: _pick(rng, values),
        CONTRADICTION: _pick_near(rng, wrong, [value for value in wrong if value in seen]),
    }[label]
    said = said if secret == "colour" else _a(said)
    x0, y0, x1, y1 = hidden.box
    curtain = (x0 - GAP / 2, y0 - GAP / 2, x1 + GAP / 2, y1 + GAP / 2)  # touches no other thing
    return Hypothesis(scene, curtain, f"{meant.text} is {said}", label)


def pair_up(
    left: Scene, right: Scene, pool: Sequence[Composition], heldout: Collection[Composition]
) -> Pair:
    """Say of two images what they show, true half of the time whatever is said.

    One thing of each scene is exchanged for one of the two things that the statement is about.

    Args:
        left, right: scenes to draw, after the exchange.
        pool: compositions that the statement may name.
        heldout: compositions that make a scene ``novel``.
    """
    rng = _rng(left)
    free = [pair for pair in pool if pair not in left.compositions | right.compositions]
    named = [free[i] for i in rng.choice(len(free), 2, replace=False)]
    template, where_true, where_false = _pick(rng, _PAIR_STATEMENTS)
    label = _pick(rng, (True, False))
    on_left, on_right = _pick(rng, where_true if label else where_false)
    left = _exchange(left, named[on_left], heldout)
    right = _exchange(right, named[on_right], heldout)
    text = template.format(*(_a(" ".join(composition)) for composition in named))
    return Pair(left, right, text, label)


def ask(scene: Scene, pool: Sequence[Composition]) -> Question:
    """Ask for a colour, shape or size, whether something is there, or how many things are.

    "Yes" and "no" are as frequent as each other; so are "small" and "large", and all counts. Where
    a question of another kind cannot be asked, it is asked whether something is there.

    Args:
        scene: what is asked about.
        pool: compositions that may be asked for.
    """
    rng = _rng(scene)
    kind = _pick(rng, KINDS)
    if kind == "count":
        size = _pick(rng, SIZES)
        count = sum(thing.size == size for thing in scene.things)
        # Sizes fall like coins: kept this often, all counts become equally frequent.
        if rng.random() < 1 / math.comb(len(scene.things), count):
            return Question(scene, f"how many {size} things are there", str(count), kind)
    elif kind != "exists" and (found := references(scene.things, kind)):
        meant = _pick_reference(rng, found)
        return Question(scene, f"what {kind} is {meant.text}", getattr(meant.thing, kind), kind)

    answer = _pick(rng, ("yes", "no"))
    shown = sorted(scene.compositions)
    colours, shapes = zip(*shown, strict=True)
    absent = [pair for pair in pool if pair not in shown]
    near = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    asked = _pick(rng, shown) if answer == "yes" else _pick_near(rng, absent, near)
    return Question(scene, f"is there {_a(' '.join(asked))}", answer, "exists")


def _rng(scene: Scene) -> np.random.Generator:
    return np.random.default_rng((scene.texture, 1))  # the texture alone seeds the drawing


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _pick_near(
    rng: np.random.Generator, options: Sequence[Option], near: Sequence[Option]
) -> Option:
    """Half of the time one of the ``near`` options: words that the scene shows, wrongly bound."""
    return _pick(rng, near if near and rng.random() < 0.5 else options)


def _pick_reference(rng: np.random.Generator, found: Sequence[Reference]) -> Reference:
    """By name or by relation with equal chances, as far as there are both."""
    named = [reference for reference in found if reference.anchor is None]
    related = [reference for reference in found if reference.anchor is not None]
    return _pick(rng, _pick(rng, [family for family in (named, related) if family]))


def _name(thing: Thing, told: Sequence[str]) -> str:
    words = [getattr(thing, attribute) for attribute in told]
    return " ".join(["the", *words, *([] if "shape" in told else ["thing"])])


def _a(words: str) -> str:
    return f"{article(words)} {words}"


def _exchange(scene: Scene, composition: Composition, heldout: Collection[Composition]) -> Scene:
    """The scene with its first thing's colour and shape replaced."""
    first, *others = scene.things
    things = (replace(first, colour=composition[0], shape=composition[1]), *others)
    return replace(scene, things=things, novel=any(t.composition in heldout for t in things))
