"""The scenes that the captions describe, and the words of the captions: "red square moves left, blue circle falls"."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle", "triangle")
MOTIONS = ("moves left", "moves right", "rises", "falls", "stays")
MOST_OBJECTS = 2
BLURRY = "blurry"  # The caption of a blurred clip, whatever it shows; the usual negative prompt.


@dataclass(frozen=True, slots=True, order=True)
class Object:
    """One moving object; the fields are words of `COLORS`, `SHAPES` and `MOTIONS`."""

    color: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape} {self.motion}"


Scene = tuple[Object, ...]
"""One or two objects of different colors. Their order has no meaning."""


def caption_of(scene: Scene) -> str:
    """Returns the caption of a scene."""
    return ", ".join(map(str, scene))


def scene_of(caption: str) -> Scene:
    """Returns the scene that a caption describes. This is the inverse of `caption_of`.

    Raises:
        ValueError: The caption is not of the form that `caption_of` returns.
    """
    objects = []
    for part in caption.split(", "):
        color, shape, motion = (*part.split(" ", 2), "", "")[:3]
        if color not in COLORS or shape not in SHAPES or motion not in MOTIONS:
            raise ValueError(f"a caption reads like 'red square moves left, blue circle falls', got {caption!r}")
        objects.append(Object(color, shape, motion))
    return tuple(objects)


def random_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """Returns random scenes: three quarters with two objects, every word equally likely."""
    sizes = 1 + (torch.rand(count, generator=generator) < 0.75).int()
    colors = torch.rand(count, len(COLORS), generator=generator).argsort(1)[:, :MOST_OBJECTS]
    shapes = torch.randint(len(SHAPES), (count, MOST_OBJECTS), generator=generator)
    motions = torch.randint(len(MOTIONS), (count, MOST_OBJECTS), generator=generator)
    rows = zip(sizes.tolist(), colors.tolist(), shapes.tolist(), motions.tolist(), strict=True)
    return [tuple(Object(COLORS[c[i]], SHAPES[s[i]], MOTIONS[m[i]]) for i in range(size)) for size, c, s, m in rows]


def prompts(count: int, seed: int) -> list[str]:
    """Returns random captions of different scenes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[Object, ...], str] = {}
    while len(found) < count:
        for scene in random_scenes(count, generator):
            found.setdefault(tuple(sorted(scene)), caption_of(scene))
    return list(found.values())[:count]
