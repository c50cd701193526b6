"""Draws clips of scenes: one or two colored objects that move on a gray background.

A clip is float32 [3, 8, 16, 16] in [-1, 1]: channels, frames, rows, columns. What a caption leaves open is random: the
size of the objects, where they are, how fast they move, and the background. Objects stay inside the frame and, with few
exceptions, apart.
"""

from __future__ import annotations

import torch
from captions import COLORS, MOST_OBJECTS, MOTIONS, SHAPES, Scene
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

FRAMES = 8
SIDE = 16  # Pixels.
RADII = (2.2, 2.7)  # Pixels; half the side of a square.
SPEEDS = (0.7, 1.0)  # Pixels per frame.
GAP = 0.3  # Pixels between two objects.
BACKGROUNDS = (0.05, 0.35)  # From black, 0, to white, 1.
TRIES = 256  # Random places per scene, of which the first in which the objects do not touch is taken.

_RGB = torch.tensor([[0.95, 0.15, 0.15], [0.15, 0.85, 0.25], [0.25, 0.4, 1.0], [1.0, 0.9, 0.15]])  # As in COLORS.
_DIRECTIONS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0]])  # (x, y), as in MOTIONS.


def draw_clips(
    scenes: list[Scene],
    generator: torch.Generator,
    radii: tuple[float, float] = RADII,
    hardness: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Returns one clip per scene, float32 [B, 3, 8, 16, 16] in [-1, 1], with objects of random sizes in `radii`.

    The hardness of edges is random, too. At 1, a pixel has the share of the color that the object covers of it. Above,
    this share is farther from a half.
    """
    present, color, shape, motion = _numbers(scenes)
    radius = _uniform(radii, (len(scenes), MOST_OBJECTS), generator)
    centers = _trajectories(present, motion, radius, generator)
    # Without a range, nothing is drawn from the generator, so that the clips of a seed stay the same.
    hard = torch.ones(len(scenes), 1) if hardness == (1.0, 1.0) else _uniform(hardness, (len(scenes), 1), generator)
    coverage = _coverage(shape, radius, centers, hard) * present[:, :, None, None, None]

    above, below = _uniform(BACKGROUNDS, (2, len(scenes), 1), generator)
    gray = torch.lerp(above, below, torch.linspace(0, 1, SIDE))
    clips = gray[:, None, None, :, None].expand(-1, 3, FRAMES, SIDE, SIDE)
    for i in range(MOST_OBJECTS):
        clips = torch.lerp(clips, _RGB[color[:, i]][:, :, None, None, None], coverage[:, i, None])
    return 2 * clips - 1


def blur(clips: Tensor) -> Tensor:
    """Returns the clips blurred by a filter of 5x5 pixels, which is a 3x3 mean filter applied twice."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    for _ in range(2):
        frames = avg_pool2d(pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return frames.unflatten(0, (-1, FRAMES)).transpose(1, 2)


def _numbers(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns whether there is an object, and the indices of its color, shape and motion, each [B, 2]."""
    rows = torch.zeros(len(scenes), MOST_OBJECTS, 4, dtype=torch.int64)
    for i, scene in enumerate(scenes):
        for j, o in enumerate(scene):
            words = COLORS.index(o.color), SHAPES.index(o.shape), MOTIONS.index(o.motion)
            rows[i, j] = torch.tensor((1, *words))
    present, color, shape, motion = rows.unbind(2)
    return present.bool(), color, shape, motion


def _trajectories(present: Tensor, motion: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the centers (x, y) of the objects in every frame, in pixels, [B, 2, 8, 2]."""
    shape = (TRIES, *radius.shape)
    travel = (FRAMES - 1) * _uniform(SPEEDS, shape, generator)[..., None] * _DIRECTIONS[motion]
    # Half a pixel stays free at the border. A path of length t in one direction leaves the rest for the start.
    low = radius[..., None] + 0.5 + (-travel).clamp(min=0)
    high = SIDE - radius[..., None] - 0.5 - travel.clamp(min=0)
    start = low + (high - low) * torch.rand(*shape, 2, generator=generator)
    steps = torch.linspace(0, 1, FRAMES)[:, None]
    centers = start[..., None, :] + travel[..., None, :] * steps
    distance = (centers[:, :, 0] - centers[:, :, 1]).abs().amax(-1).amin(-1)
    free = (distance > radius.sum(1) + GAP) | ~present.all(1)
    # The first free try. Where none is free, the try with the largest distance.
    pick = torch.where(free.any(0), free.int().argmax(0), distance.argmax(0))
    return centers[pick, torch.arange(len(pick))]


def _coverage(shape: Tensor, radius: Tensor, centers: Tensor, hardness: Tensor) -> Tensor:
    """Returns the share of every pixel that an object covers, from its distance to the edge, [B, 2, 8, 16, 16]."""
    at = torch.arange(SIDE) + 0.5
    x = at[None, :] - centers[..., 0, None, None]
    y = at[:, None] - centers[..., 1, None, None]
    r = radius[:, :, None, None, None]
    square = torch.maximum(x.abs(), y.abs()) - r
    circle = torch.hypot(x, y) - 1.05 * r
    # An isosceles triangle, apex at (0, -r), base from (-r, r) to (r, r), slightly larger than the square's half.
    slope = (2 * x.abs() - y - 1.2 * r) / 5**0.5
    triangle = torch.maximum(slope, y - r)
    kind = shape[:, :, None, None, None]
    distance = torch.where(kind == 0, square, torch.where(kind == 1, circle, triangle))
    return (0.5 - hardness[:, :, None, None, None] * distance).clamp(0, 1)


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)
