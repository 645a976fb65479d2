"""Captions, statements, questions and referring expressions about scenes, with their truth.

Each function makes one item from its arguments alone: the scene's ``texture`` seeds its draws. The
truth follows from the scene; the words alone give nothing away, since right and wrong statements
are drawn in the same way. An item is an entry of a data set's annotation, with LAVIS's keys, and
``scenes``, which it is about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import numpy as np

from softmask_plugin.datasets.scenes import grammar
from softmask_plugin.datasets.scenes.grammar import SHAPES, SIZES, Composition, Scene, Thing
from softmask_plugin.errors import UserError

COUNTS = tuple(map(str, range(grammar.MAX_OBJECTS + 1)))
ANSWERS = (*grammar.COLOURS, *SHAPES, *SIZES, "yes", "no", *COUNTS)
KINDS = ("colour", "shape", "size", "exists", "count")  # of questions
VALUES = {"colour": tuple(grammar.COLOURS), "shape": SHAPES, "size": SIZES}
FOILS = (*VALUES, "swap", "relation")  # groups of foils
CONTRADICTION, NEUTRAL, ENTAILMENT = "contradiction", "neutral", "entailment"

# Statements about two compositions, of which each image shows one; then which of them the left and
# the right image show if the statement is true, and if it is false. With only one image in view,
# the best guess about them is right 75%, 50%, 50% and 83% of the time.
_PAIR_STATEMENTS = (
    ("both images show {0}", ((0, 0),), ((0, 1), (1, 0))),
    ("only one image shows {0}", ((0, 1), (1, 0)), ((0, 0), (1, 1))),
    ("one image shows {0} and the other {1}", ((0, 1), (1, 0)), ((0, 0), (1, 1))),
    ("the left image shows {0} and the right image {1}", ((0, 1),), ((1, 0), (0, 0), (1, 1))),
)

Item = dict[str, Any]
Things = tuple[Thing, ...]
Option = TypeVar("Option")


class Reference(NamedTuple):
    """Words that fit only one thing of a scene, perhaps by its relation to an ``anchor``."""

    text: str
    thing: Thing
    anchor: Thing | None = None


def describe(scene: Scene, captions_per_image: int | None = None) -> Item:
    """Describe a scene by its captions, the most detailed first; None: all of them.

    Returns ``caption``, a list, and ``word_boxes``, the ``boxes`` of each ``Caption``. UserError if
    the scene has fewer captions.
    """
    chosen = grammar.captions(scene)
    if captions_per_image is not None and captions_per_image > len(chosen):
        raise UserError(
            f"captions_per_image is {captions_per_image}, but a scene of {len(scene.things)} "
            f"object(s) has {len(chosen)} captions: ask for fewer"
        )
    chosen = chosen[:captions_per_image]
    texts, boxes = [each.text for each in chosen], [each.boxes for each in chosen]
    return {"scenes": (scene,), "caption": texts, "word_boxes": boxes}


def references(things: Sequence[Thing], secret: str | None = None) -> list[Reference]:
    """List all expressions that fit exactly one of the things.

    They are "the small red circle" with one to three of its words ("the red thing" without the
    shape), and "the thing above the red circle". None tells the ``secret``: ``"colour"``,
    ``"shape"`` or ``"size"``.
    """
    attributes = [name for name in ("size", "colour", "shape") if name != secret]
    found = []
    for told in (told for n in (1, 2, 3) for told in combinations(attributes, n)):
        texts = [_name(thing, told) for thing in things]
        pairs = zip(texts, things, strict=True)
        found += [Reference(text, thing) for text, thing in pairs if texts.count(text) == 1]
    for anchor in things:
        others = [thing for thing in things if thing is not anchor]
        where = [grammar.relation(thing, anchor) for thing in others]
        found += [
            Reference(f"the thing {how} {_name(anchor, ('colour', 'shape'))}", thing, anchor)
            for how, thing in zip(where, others, strict=True)
            if where.count(how) == 1
        ]
    return found


def refer(scene: Scene) -> Item:
    """Refer to a thing, half of the time by a relation: "the thing above the red circle".

    Returns ``text``, ``box`` of the thing meant and ``boxes`` of all, (x0, y0, x1, y1) in [0, 1].
    """
    meant = _pick_reference(_rng(scene), references(scene.things))
    boxes = [thing.box for thing in scene.things]
    return {"scenes": (scene,), "text": meant.text, "box": meant.thing.box, "boxes": boxes}


def name_things(scene: Scene, alone: bool) -> list[Item]:
    """Name the things of a scene by colour and shape: in its first caption, or each ``alone``.

    Returns for each text ``text``, ``boxes`` of all things, and ``phrases``, one for each word that
    is a colour or shape: ``words`` (its number in the text), ``box`` of what it names (a list) and
    ``group`` (``colour`` or ``shape``, a list).
    """
    boxes = [thing.box for thing in scene.things]
    texts = [(each.text, each.boxes) for each in grammar.captions(scene)[:1]]
    if alone:
        texts = [
            (_a(" ".join(thing.composition)), ((1, thing.box, "colour"), (2, thing.box, "shape")))
            for thing in scene.things
        ]
    return [
        {
            "scenes": (scene,),
            "text": text,
            "boxes": boxes,
            "phrases": [
                {"words": [word], "box": [box], "group": [role]}
                for word, box, role in named
                if role in ("colour", "shape")
            ],
        }
        for text, named in texts
    ]


def entail(scene: Scene, pool: Sequence[Composition]) -> Item:
    """State the colour or shape of one thing, and hide one thing behind a curtain.

    "The circle is red" is entailed or contradicted if the circle is in view, and neutral if it is
    behind the curtain. The thing meant and the label are drawn before the curtain, so that the
    picture without the words gives nothing away either.

    The scene has two or more things; if more, some are meant by their relation to another. What is
    stated, rightly or wrongly, is in ``pool``. Returns ``sentence``, ``label`` (``contradiction``,
    ``neutral`` or ``entailment``) and ``curtain``, (x0, y0, x1, y1) in [0, 1].
    """
    rng = _rng(scene)
    spare = len(scene.things) > 2  # one can be hidden besides the thing meant and its anchor
    described = {
        secret: [r for r in references(scene.things, secret) if spare or r.anchor is None]
        for secret in ("colour", "shape")
    }
    secret = _pick(rng, [each for each, found in described.items() if found])
    meant = _pick_reference(rng, described[secret])
    label = _pick(rng, (CONTRADICTION, NEUTRAL, ENTAILMENT))
    hidden = meant.thing
    if label != NEUTRAL:
        spoken_of = (meant.thing, meant.anchor)
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
    sentence = f"{meant.text} is {said if secret == 'colour' else _a(said)}"
    return {"scenes": (scene,), "curtain": _curtain(hidden), "sentence": sentence, "label": label}


def foil_groups(objects: int, curtain: bool) -> tuple[str, ...]:
    """The groups of foils about scenes of so many things. Behind a curtain there is one that the
    change is not about: a swap is about two, a relation perhaps about all."""
    return FOILS[: 3 + (objects > 2)] if curtain else FOILS


def foils(scene: Scene, curtain: bool = False) -> list[Item]:
    """Change the most detailed caption of a scene so that it is false: once for each group.

    - ``colour``, ``shape``, ``size``: another value for one thing, so that no two things share
      colour and shape;
    - ``swap``: the first thing and another exchange their colours, shapes or sizes, so that only
      what belongs to what is wrong;
    - ``relation``: the opposite of one relation, and of others along the same axis.

    Each foil is the caption of another scene, which is as likely as this one and whose foil may in
    turn be this caption. So the words give nothing away. (Any other relation, or only one of two
    along an axis, would: three things in a row are frequent.)

    The scene has two or more things. Returns for each group ``caption``, ``foil``, ``group`` and,
    with ``curtain``, one that hides a thing that the change is not about.
    """
    rng, caption, items = _rng(scene), grammar.captions(scene)[0].text, []
    for group in foil_groups(len(scene.things), curtain):
        change = {"swap": _exchange, "relation": _mirror}.get(group, _change_one)
        things = change(rng, scene.things, group)
        false = grammar.captions(replace(scene, things=things))[0].text
        item = {"scenes": (scene,), "caption": caption, "foil": false, "group": group}
        if curtain:
            pairs = zip(scene.things, things, strict=True)
            item["curtain"] = _curtain(_pick(rng, [old for old, new in pairs if old == new]))
        items.append(item)
    return items


def compare(left: Scene, right: Scene, pool: Sequence[Composition]) -> Item:
    """State what two images show; each kind of statement is true half of the time.

    In each scene, one thing is replaced by one of the two things of ``pool`` that the statement is
    about. Returns ``sentence`` and ``label``, ``"True"`` or ``"False"``.
    """
    rng = _rng(left)
    free = [pair for pair in pool if pair not in left.compositions | right.compositions]
    named = [free[i] for i in rng.choice(len(free), 2, replace=False)]
    template, where_true, where_false = _pick(rng, _PAIR_STATEMENTS)
    label = _pick(rng, (True, False))
    on_left, on_right = _pick(rng, where_true if label else where_false)
    left = _replace_first(left, named[on_left])
    right = _replace_first(right, named[on_right])
    sentence = template.format(*(_a(" ".join(composition)) for composition in named))
    return {"scenes": (left, right), "sentence": sentence, "label": str(label)}


def ask(scene: Scene, pool: Sequence[Composition]) -> Item:
    """Ask for a colour, shape or size, whether something is there, or how many things are.

    "Yes" and "no" are equally frequent, and so are "small" and "large", and all counts. If a
    question of another kind is impossible, the question is whether something of ``pool`` is there.
    Returns ``question``, ``answer`` ({one of ANSWERS: 1.0}) and ``kind``, one of KINDS.
    """
    rng = _rng(scene)
    kind = _pick(rng, KINDS)
    if kind == "count":
        size = _pick(rng, SIZES)
        count = sum(thing.size == size for thing in scene.things)
        # Sizes fall like coins; asking this often makes all counts equally frequent.
        if rng.random() < 1 / math.comb(len(scene.things), count):
            return _question(scene, f"how many {size} things are there", str(count), kind)
    elif kind != "exists" and (found := references(scene.things, kind)):
        meant = _pick_reference(rng, found)
        return _question(scene, f"what {kind} is {meant.text}", getattr(meant.thing, kind), kind)

    answer = _pick(rng, ("yes", "no"))
    shown = sorted(scene.compositions)
    colours, shapes = zip(*shown, strict=True)
    absent = [pair for pair in pool if pair not in shown]
    near = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    asked = _pick(rng, shown) if answer == "yes" else _pick_near(rng, absent, near)
    return _question(scene, f"is there {_a(' '.join(asked))}", answer, "exists")


def _change_one(rng: np.random.Generator, things: Things, attribute: str) -> Things:
    """Give one thing another colour, shape or size."""
    i = int(rng.integers(len(things)))
    others = {thing.composition for thing in (*things[:i], *things[i + 1 :])}
    old = getattr(things[i], attribute)
    values: list[Any] = [value for value in VALUES[attribute] if value != old]
    changed = [replace(things[i], **{attribute: value}) for value in values]
    new = _pick(rng, [thing for thing in changed if thing.composition not in others])
    return (*things[:i], new, *things[i + 1 :])


def _exchange(rng: np.random.Generator, things: Things, _: str) -> Things:
    """Let the first thing and another exchange a colour, shape or size."""
    found: dict[int, list[Things]] = {}
    first = things[0]
    for j, other in enumerate(things[1:], start=1):
        for attribute in VALUES:
            mine, theirs = getattr(first, attribute), getattr(other, attribute)
            new = list(things)
            new[0] = replace(first, **{attribute: theirs})
            new[j] = replace(other, **{attribute: mine})
            if mine != theirs and len({thing.composition for thing in new}) == len(new):
                found.setdefault(j, []).append(tuple(new))
    return _pick(rng, found[_pick(rng, list(found))])


def _mirror(rng: np.random.Generator, things: Things, _: str) -> Things:
    """Mirror the scene along the axis of a relation of its first thing."""
    how = grammar.relation(things[0], _pick(rng, things[1:]))
    axis = "x" if how in (grammar.LEFT, grammar.RIGHT) else "y"
    return tuple(replace(thing, **{axis: 1 - getattr(thing, axis)}) for thing in things)


def _curtain(hidden: Thing) -> grammar.Box:
    """What covers a thing and touches no other."""
    (x0, y0, x1, y1), pad = hidden.box, grammar.GAP / 2
    return x0 - pad, y0 - pad, x1 + pad, y1 + pad


def _question(scene: Scene, text: str, answer: str, kind: str) -> Item:
    return {"scenes": (scene,), "question": text, "answer": {answer: 1.0}, "kind": kind}


def _rng(scene: Scene) -> np.random.Generator:
    return np.random.default_rng((scene.texture, 1))  # scene.texture alone seeds render()


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _pick_near(
    rng: np.random.Generator, options: Sequence[Option], near: Sequence[Option]
) -> Option:
    """Pick a ``near`` option half of the time: words that the scene shows, wrongly combined."""
    return _pick(rng, near if near and rng.random() < 0.5 else options)


def _pick_reference(rng: np.random.Generator, found: Sequence[Reference]) -> Reference:
    """Pick by name or by relation with equal chances, if there are both."""
    named = [each for each in found if each.anchor is None]
    related = [each for each in found if each.anchor is not None]
    return _pick(rng, _pick(rng, [family for family in (named, related) if family]))


def _name(thing: Thing, told: Sequence[str]) -> str:
    words = " ".join(getattr(thing, attribute) for attribute in told)
    return f"the {words}" if "shape" in told else f"the {words} thing"


def _a(words: str) -> str:
    return f"{grammar.article(words)} {words}"


def _replace_first(scene: Scene, composition: Composition) -> Scene:
    first, *others = scene.things
    colour, shape = composition
    return replace(scene, things=(replace(first, colour=colour, shape=shape), *others))
