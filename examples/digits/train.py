"""Trains the digit model from scratch: a rectified flow on the 8x8 digits of scikit-learn.

    python examples/digits/train.py

Ctrl-C writes a checkpoint and stops; the same command continues from the checkpoint. The checkpoint contains the state
of the random generator, so an interrupted run results in the same weights as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import sklearn
import torch
from model import WEIGHTS, build_transformer, class_conditioning, patchify, position_ids
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import mse_loss

sys.path.append(str(Path(__file__).parent.parent))
from training import TrainingRun, argument_parser, run


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the weights, except the versions of the libraries."""

    seed: int = 0
    iterations: int = 4000
    batch_size: int = 64
    peak_learning_rate: float = 1e-3
    ema_decay: float = 0.998
    gradient_norm: float = 1.0


class Trainer(TrainingRun):
    """One run: the model, its optimizer and moving average, and their checkpoints."""

    clock = staticmethod(time.perf_counter)
    checkpoint_every = 250
    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.model = build_transformer().train()
        self.ema = self.average(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.peak_learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=recipe.peak_learning_rate, total_steps=recipe.iterations
        )
        self.images, self.digits = load_data()
        self.text_ids, self.image_ids = position_ids()

    def loss(self) -> Tensor:
        """Returns the flow matching loss of one random batch, a scalar.

        `FluxPipeline` passes timestep / 1000 to the model, which is sigma: 1 is noise, 0 is data. On the straight line
        x = (1 - sigma) * data + sigma * noise, the velocity dx/dsigma is noise - data.
        """
        pick = torch.randint(len(self.images), (self.recipe.batch_size,), generator=self.generator)
        data = patchify(self.images[pick])
        noise = torch.randn(data.shape, generator=self.generator)
        # Logit-normal: most samples are in the middle of the line, where the velocity is hardest to predict.
        sigma = torch.randn(len(pick), generator=self.generator).sigmoid()
        at = sigma[:, None, None]
        tokens, pooled = class_conditioning(self.digits[pick])
        velocity = self.model(
            hidden_states=(1 - at) * data + at * noise,
            timestep=sigma,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return mse_loss(velocity, noise - data)

    def save_weights(self, path: Path) -> None:
        """Writes the averaged weights in float16, and a JSON file that describes how they were trained."""
        facts = {
            "training_minutes": round(self.progress.seconds / 60, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        self.write_weights(path, self.ema.module.state_dict(), facts, {"scikit-learn": sklearn.__version__})


def load_data() -> tuple[Tensor, Tensor]:
    """Returns the 1797 images, float32 [N, 8, 8] in [-1, 1], and their classes, int64 [N]."""
    digits = load_digits()
    # The file contains gray levels from 0 to 16.
    return torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target, dtype=torch.int64)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line. Some fields of `Recipe` are options."""
    parser = argument_parser(__doc__, WEIGHTS, Recipe().seed)
    parser.add_argument("--iterations", type=int, default=Recipe().iterations)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    run(Trainer(Recipe(seed=arguments.seed, iterations=arguments.iterations)), arguments.out, arguments.checkpoint)


if __name__ == "__main__":
    main()
