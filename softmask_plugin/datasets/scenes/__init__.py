"""Scenes: coloured shapes rendered from a seed, with captions, boxes and tasks."""

from softmask_plugin.datasets.scenes.grammar import Scene, Thing, captions, make_scenes
from softmask_plugin.datasets.scenes.render import render

__all__ = ["Scene", "Thing", "captions", "make_scenes", "render"]
