"""A small network that reads the scene of a clip: for each color, the shape of the object, if any, and its motion.

    python examples/clips/judge.py    # trains it again, in eight minutes

It is trained on drawn clips with noise, blur and changes of contrast and sharpness, and never on generated ones.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path

import torch
from captions import COLORS, MOTIONS, SHAPES, Object, Scene, random_scenes, scene_of
from draw import FRAMES, SIDE, blur, draw_clips
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate
from tqdm import tqdm

WEIGHTS = Path(__file__).with_name("judge.safetensors")
ABSENT = len(SHAPES)  # The class of a color that no object has.
ITERATIONS = 2400
BATCH_SIZE = 32
LEARNING_RATE = 4e-3
# Wider ranges than those of the clips, since generated objects vary more.
RADII = (2.0, 3.1)  # Pixels.
HARDNESS = (0.8, 5.0)
UNEVENNESS = 0.5  # Pixels.


class Judge(nn.Module):
    """Separates the colors, and applies one convolutional network to each of them.

    The input are clips, float32 [B, 3, 8, 16, 16] in [-1, 1]. The outputs are the scores of the shapes, [B, 4, 4], of
    which the last is the score of an absent object, and of the motions, [B, 4, 5].
    """

    def __init__(self) -> None:
        super().__init__()
        # The same for every pixel. The result has a channel for each color.
        self.separate = nn.Sequential(nn.Conv3d(3, 16, 1), nn.GELU(), nn.Conv3d(16, len(COLORS), 1))
        self.features = nn.Sequential(
            nn.Conv3d(1, 12, (1, 3, 3), padding=(0, 1, 1)),
            nn.GELU(),
            nn.Conv3d(12, 24, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.GELU(),
            nn.Conv3d(24, 48, 3, stride=(2, 2, 2), padding=1),
            nn.GELU(),
            nn.Conv3d(48, 64, 3, stride=(2, 1, 1), padding=1),
            nn.GELU(),
        )
        self.heads = nn.Sequential(nn.Linear(2 * 64, 64), nn.GELU(), nn.Linear(64, len(SHAPES) + 1 + len(MOTIONS)))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        places = self.features(self.separate(clips).flatten(0, 1)[:, None]).flatten(2)
        scores = self.heads(torch.cat((places.amax(2), places.mean(2)), dim=1)).unflatten(0, (-1, len(COLORS)))
        return scores[..., : len(SHAPES) + 1], scores[..., len(SHAPES) + 1 :]


def read(judge: Judge, clips: Tensor) -> list[Scene]:
    """Returns the scenes that the judge sees in clips, float32 [B, 3, 8, 16, 16] in [-1, 1]. A scene may be empty."""
    with torch.no_grad():
        shapes, motions = (scores.argmax(-1).tolist() for scores in judge(clips))
    return [
        tuple(
            Object(color, SHAPES[shape], MOTIONS[motion])
            for color, shape, motion in zip(COLORS, *row, strict=True)
            if shape != ABSENT
        )
        for row in zip(shapes, motions, strict=True)
    ]


def accuracy(clips: Tensor, captions: list[str]) -> float:
    """Returns the share of clips in which the trained judge reads exactly the objects of the caption.

    A clip counts if there are as many objects as in the caption, each with its color, shape and motion. Clips are
    float32 [B, 3, 8, 16, 16] in [-1, 1].
    """
    scenes = read(load_judge(), clips)
    return sum(set(s) == set(scene_of(c)) for s, c in zip(scenes, captions, strict=True)) / len(captions)


@cache
def load_judge(path: Path = WEIGHTS) -> Judge:
    """Returns the trained judge in float32. The file contains the weights in float16."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Returns the classes of shapes and motions, int64 [B, 4]. The motion of an absent object is -100."""
    shapes = torch.full((len(scenes), len(COLORS)), ABSENT)
    motions = torch.full_like(shapes, -100)  # Ignored by the cross entropy.
    for i, scene in enumerate(scenes):
        for o in scene:
            color = COLORS.index(o.color)
            shapes[i, color], motions[i, color] = SHAPES.index(o.shape), MOTIONS.index(o.motion)
    return shapes, motions


def disturb(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the clips with uneven edges and random contrast, sharpness and noise.

    Generated objects are not as even as drawn ones, and a high guidance scale raises contrast and sharpness.
    """
    contrast, sharpness, noise = torch.rand(3, len(clips), 1, 1, 1, 1, generator=generator)
    clips = warp(clips, generator)
    clips = torch.lerp(clips, blur(clips), 0.5 - sharpness)
    background = clips.flatten(2).median(2).values[..., None, None, None]
    clips = torch.lerp(background, clips, 0.8 + contrast)
    return (clips + 0.12 * noise * torch.randn(clips.shape, generator=generator)).clamp(-1, 1)


def warp(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the clips with every pixel moved by a random distance that varies slowly over a frame.

    Half of the movement is that of all frames. Its standard deviation at the nodes of a 6x6 grid is `UNEVENNESS` pixels
    at most.
    """
    shape = (len(clips), FRAMES, 2, 6, 6)
    moved = torch.randn(shape, generator=generator) + torch.randn(shape, generator=generator)[:, :1]
    amount = UNEVENNESS / 2**0.5 * torch.rand(len(clips), 1, 1, 1, 1, generator=generator)
    moved = interpolate((amount * moved).flatten(0, 1), size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    at = torch.arange(SIDE) + 0.5
    grid = torch.stack((at.expand(SIDE, SIDE), at[:, None].expand(SIDE, SIDE)), dim=-1) + moved.movedim(1, -1)
    frames = clips.transpose(1, 2).flatten(0, 1)
    frames = grid_sample(frames, 2 * grid / SIDE - 1, padding_mode="border", align_corners=False)
    return frames.unflatten(0, (-1, FRAMES)).transpose(1, 2)


def train(iterations: int, generator: torch.Generator) -> Judge:
    """Returns a judge trained on drawn clips."""
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=iterations)
    for _ in tqdm(range(iterations), desc="training the judge", unit="it"):
        scenes = random_scenes(BATCH_SIZE, generator)
        outputs = judge(disturb(draw_clips(scenes, generator, RADII, HARDNESS), generator))
        loss = sum(cross_entropy(o.flatten(0, 1), t.flatten()) for o, t in zip(outputs, targets(scenes), strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file for the weights")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    started = time.process_time()
    judge = train(arguments.iterations, generator)
    minutes = (time.process_time() - started) / 60
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, arguments.out)

    scenes = random_scenes(4000, torch.Generator().manual_seed(1))
    clips = draw_clips(scenes, generator)
    judge = load_judge(arguments.out)
    shares = {}
    for name, shown in {"drawn": clips, "disturbed": disturb(clips, generator)}.items():
        pairs = zip(read(judge, shown), scenes, strict=True)
        shares[name] = sum(set(seen) == set(scene) for seen, scene in pairs) / len(scenes)
    print(json.dumps({"training_minutes": round(minutes, 1), "clips": len(scenes), "right": shares}))


if __name__ == "__main__":
    main()
