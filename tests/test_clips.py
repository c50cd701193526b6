"""The clips of examples/clips show what their captions say: drawn, generated, and generated with the cache."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

import cachedit_fx
from cachedit_fx.runtime.stats import CacheStats

FOLDER = Path(__file__).parent.parent / "examples" / "clips"
MODULES = ("captions", "draw", "judge", "model", "pictures", "text", "train")


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Makes the scripts of a folder importable by their short names, which other folders have as well."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in MODULES:
            sys.modules.pop(name, None)


with importable(FOLDER):
    clips = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centers(clip: Tensor) -> Tensor:
    """Returns the center (x, y) of the pixels with a color, in every frame of a clip, [8, 2]."""
    colored = clip.amax(0) - clip.amin(0)
    at = torch.arange(clips.draw.SIDE) + 0.5
    x, y = (colored * at).sum((1, 2)), (colored * at[:, None]).sum((1, 2))
    return torch.stack((x, y), 1) / colored.sum((1, 2))[:, None]


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    """Captions, and the clips that the trained model generates from them in few steps."""
    captions = clips.captions.prompts(8, seed=3)
    pipe = clips.model.build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(prompt=captions, **clips.model.call_arguments(seed=3, steps=8)).frames
    return SimpleNamespace(captions=captions, clips=clips.model.clips_of(frames))


def test_a_caption_describes_one_scene():
    scenes = clips.captions.random_scenes(300, generator())
    assert {len(scene) for scene in scenes} == {1, 2}
    for scene in scenes:
        assert len({o.color for o in scene}) == len(scene)
        assert clips.captions.scene_of(clips.captions.caption_of(scene)) == scene


@pytest.mark.parametrize("caption", ["", "red square", "red square falls, ", "square red falls", "red square jumps"])
def test_another_sentence_is_refused(caption):
    with pytest.raises(ValueError, match="a caption reads like 'red square moves left, blue circle falls'"):
        clips.captions.scene_of(caption)


def test_a_seed_gives_captions_of_different_scenes():
    captions = clips.captions.prompts(300, seed=5)
    assert captions == clips.captions.prompts(300, seed=5) != clips.captions.prompts(300, seed=6)
    assert len({tuple(sorted(clips.captions.scene_of(caption))) for caption in captions}) == 300


@pytest.mark.parametrize(
    ("motion", "x", "y"),
    [("moves left", -1, 0), ("moves right", 1, 0), ("rises", 0, -1), ("falls", 0, 1), ("stays", 0, 0)],
)
def test_an_object_moves_as_its_caption_says(motion, x, y):
    scenes = [clips.captions.scene_of(f"blue {shape} {motion}") for shape in clips.captions.SHAPES]
    for clip in clips.draw.draw_clips(scenes, generator()):
        moved = centers(clip)[-1] - centers(clip)[0]
        assert moved.sign().where(moved.abs() > 0.1, torch.zeros(2)).tolist() == [x, y]
        assert x == y == 0 or 4.5 < moved.abs().amax() < 7.5  # Pixels.


def test_the_latents_of_drawn_clips_have_mean_zero_and_variance_one():
    drawn = clips.draw.draw_clips(clips.captions.random_scenes(400, generator()), generator())
    latents = clips.model.latents_of(drawn)
    assert latents.mean((0, 2, 3, 4)).tolist() == pytest.approx([0, 0, 0], abs=0.1)
    assert latents.std((0, 2, 3, 4)).tolist() == pytest.approx([1, 1, 1], abs=0.1)


def test_the_pipeline_encodes_captions_like_the_training():
    pipe = clips.model.build_pipeline(clips.model.build_transformer(), clips.text.build_text_encoder().eval())
    captions = ["", clips.captions.BLURRY, *clips.captions.prompts(40, seed=0)]
    ids = pipe.tokenizer(captions)["input_ids"]
    assert max(map(len, ids)) <= clips.text.TEXT_TOKENS
    assert all(pipe.tokenizer.unk_token_id not in row for row in ids)
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(captions, None, False, max_sequence_length=clips.text.TEXT_TOKENS)
        torch.testing.assert_close(clips.text.encode(pipe.text_encoder, pipe.tokenizer, captions), expected)


def test_the_judge_reads_drawn_clips():
    captions = clips.captions.prompts(150, seed=7)
    drawn = clips.draw.draw_clips([clips.captions.scene_of(caption) for caption in captions], generator())
    assert clips.judge.accuracy(drawn, captions) >= 0.99
    assert clips.judge.accuracy(drawn.flip(2), captions) < 0.3  # Backwards, only what stays is right.
    assert clips.judge.accuracy(drawn[:, [2, 0, 1]], captions) < 0.1  # In other colors.


def test_the_trained_model_generates_what_the_captions_say(trained):
    assert trained.clips.shape == (8, 3, 8, 16, 16)
    assert clips.judge.accuracy(trained.clips, trained.captions) >= 7 / 8
    assert clips.judge.accuracy(trained.clips, trained.captions[::-1]) <= 1 / 8


def test_both_guidance_branches_are_cached_separately(trained):
    pipe = cachedit_fx.enable_cache(
        clips.model.build_pipeline(), inner_backend="eager", residual_diff_threshold=0.2, max_warmup_steps=2
    )
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(prompt=trained.captions, **clips.model.call_arguments(seed=3, steps=8)).frames
    stats = cachedit_fx.summary(pipe, logging=False)
    assert [(s.session, s.num_steps) for s in stats] == [("cond", 8), ("uncond", 8)]
    assert all(s.cached_steps for s in stats)
    assert clips.judge.accuracy(clips.model.clips_of(frames), trained.captions) >= 6 / 8


def test_an_interrupted_training_continues_to_the_same_weights(tmp_path):
    recipe = clips.train.Recipe(text_iterations=2, batch_size=2, schedule=((0, 1.0), (2, 1.0)))
    whole, first, second = (clips.train.Trainer(recipe) for _ in range(3))
    whole.iterate()
    whole.iterate()
    first.iterate()
    first.save_checkpoint(tmp_path / "checkpoint.pt")
    second.load_checkpoint(tmp_path / "checkpoint.pt")
    second.iterate()
    assert second.progress.losses == whole.progress.losses
    for one, other in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_blurred_clips_have_the_negative_prompt_as_their_caption():
    trainer = clips.train.Trainer(clips.train.Recipe(text_iterations=0, batch_size=200))
    drawn, captions = trainer.batch()
    sharpness = (drawn.diff(dim=-1).abs().amax((1, 2, 3, 4))).tolist()
    blurred = [s for s, caption in zip(sharpness, captions, strict=True) if caption == clips.captions.BLURRY]
    assert 5 <= len(blurred) <= 40 and 5 <= captions.count("") <= 40
    assert max(blurred) < min(s for s, c in zip(sharpness, captions, strict=True) if c != clips.captions.BLURRY)


def test_the_demo_draws_a_sheet_and_an_animation(tmp_path):
    captions = clips.captions.prompts(2, seed=0)
    drawn = clips.draw.draw_clips([clips.captions.scene_of(caption) for caption in captions], generator())
    stats = [CacheStats("blocks[1:]", name, 4, [2]) for name in ("cond", "uncond")]
    outcomes = [
        clips.pictures.Outcome(caption, clip, 0.9 * clip, 1.0, 0.5, stats, caption, caption, True, True)
        for caption, clip in zip(captions, drawn, strict=True)
    ]
    clips.pictures.draw_sheet(outcomes, tmp_path / "clips.png")
    clips.pictures.draw_animation(outcomes, tmp_path / "clips.gif")
    assert Image.open(tmp_path / "clips.gif").n_frames == clips.draw.FRAMES
    assert Image.open(tmp_path / "clips.png").width > 1000
