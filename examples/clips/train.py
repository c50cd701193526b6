"""Trains the clip model from scratch: a rectified flow on clips that are drawn during training.

    python examples/clips/train.py

Ctrl-C writes a checkpoint and stops; the same command continues from the checkpoint. The checkpoint contains the state
of the random generator, so an interrupted run results in the same weights as an uninterrupted one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from captions import BLURRY, caption_of, random_scenes
from draw import blur, draw_clips
from model import FLOW_SHIFT, WEIGHTS, build_transformer, latents_of
from text import build_tokenizer, encode, train_text_encoder
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LRScheduler

sys.path.append(str(Path(__file__).parent.parent))
from training import TrainingRun, argument_parser, run


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the weights, except the versions of the libraries and the processor.

    Attributes:
        text_iterations: The iterations of the text encoder, which is trained first.
        empty_share: The share of clips whose caption is replaced by the empty one, for guidance without a negative
            prompt.
        blurry_share: The share of clips that are blurred and captioned "blurry", which is the negative prompt.
        schedule: Pairs of an iteration and a share of the learning rate. The share is linear between them, and training
            ends at the last one.
    """

    seed: int = 0
    text_iterations: int = 500
    batch_size: int = 24
    learning_rate: float = 1.5e-3
    schedule: tuple[tuple[int, float], ...] = (
        (0, 0.0),
        (150, 1.0),
        (2880, 1.0),
        (5040, 0.5),
        (6318, 0.35),
        (9200, 0.3),
        (10600, 0.0),
    )
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    gradient_norm: float = 1.0
    empty_share: float = 0.1
    blurry_share: float = 0.1

    @property
    def iterations(self) -> int:
        return self.schedule[-1][0]


class Trainer(TrainingRun):
    """One run: the text encoder, the transformer with its optimizer and moving average, and their checkpoints."""

    checkpoint_every = 100
    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.tokenizer = build_tokenizer()
        self.text_encoder = train_text_encoder(self.tokenizer, recipe.text_iterations, self.generator)
        self.model = build_transformer().train()
        self.ema = self.average(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.adam_betas,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate)

    def _learning_rate(self, iteration: int) -> float:
        """Returns the learning rate of an iteration as a share of the highest one."""
        return float(np.interp(iteration + 1, *zip(*self.recipe.schedule, strict=True)))

    def batch(self) -> tuple[Tensor, list[str]]:
        """Draws new clips, float32 [B, 3, 8, 16, 16], and returns them with their captions."""
        scenes = random_scenes(self.recipe.batch_size, self.generator)
        clips, captions = draw_clips(scenes, self.generator), [caption_of(scene) for scene in scenes]
        blurred = blur(clips)
        for i, share in enumerate(torch.rand(len(captions), generator=self.generator).tolist()):
            if share < self.recipe.empty_share:
                captions[i] = ""
            elif share > 1 - self.recipe.blurry_share:
                captions[i], clips[i] = BLURRY, blurred[i]
        return clips, captions

    def loss(self) -> Tensor:
        """Returns the flow matching loss of one random batch, a scalar.

        `WanPipeline` passes 1000 * sigma to the model as the timestep: 1 is noise, 0 is data. On the straight line
        x = (1 - sigma) * data + sigma * noise, the velocity dx/dsigma is noise - data.
        """
        clips, captions = self.batch()
        data = latents_of(clips)
        noise = torch.randn(data.shape, generator=self.generator)
        # Uniform, one from each of B equal intervals, then shifted like the sigmas of the scheduler.
        sigma = (torch.arange(len(data)) + torch.rand(len(data), generator=self.generator)) / len(data)
        sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
        at = sigma[:, None, None, None, None]
        with torch.no_grad():
            text = encode(self.text_encoder, self.tokenizer, captions)
        velocity = self.model(
            hidden_states=(1 - at) * data + at * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        return mse_loss(velocity, noise - data)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | LRScheduler]:
        return {"text_encoder": self.text_encoder, **super().parts()}

    def save_weights(self, path: Path) -> None:
        """Writes the averaged weights in float16, and a JSON file that describes how they were trained."""
        parts = {"transformer": self.ema.module, "text_encoder": self.text_encoder}
        weights = {f"{part}.{name}": v for part, module in parts.items() for name, v in module.state_dict().items()}
        facts = {
            "training_cpu_minutes": round(self.progress.seconds / 60, 1),
            "parameters": self.model.num_parameters(),
            "text_encoder_parameters": self.text_encoder.num_parameters(),
        }
        self.write_weights(path, weights, facts, {"transformers": transformers.__version__})


def main() -> None:
    arguments = argument_parser(__doc__, WEIGHTS, Recipe().seed).parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(Recipe(seed=arguments.seed))
    trainer.model.compile_repeated_blocks()
    run(trainer, arguments.out, arguments.checkpoint)


if __name__ == "__main__":
    main()
