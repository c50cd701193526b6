"""Trains the digit model from scratch: a rectified flow on the 8x8 digits of scikit-learn.

    python examples/digits/train.py

Ctrl-C writes a checkpoint and stops; the same command continues from the checkpoint. The checkpoint contains the state
of the random generator, so an interrupted run results in the same weights as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import sklearn
import torch
from diffusers import FluxTransformer2DModel
from model import WEIGHTS, build_transformer, class_conditioning, patchify, position_ids
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

CHECKPOINT_EVERY = 250  # Iterations.
LOSS_WINDOW = 200  # Number of iterations over which a displayed or recorded loss is averaged.


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the weights, except the versions of the libraries."""

    seed: int = 0
    iterations: int = 4000
    batch_size: int = 64
    peak_learning_rate: float = 1e-3
    ema_decay: float = 0.998
    gradient_norm: float = 1.0


@dataclass(slots=True)
class Progress:
    """The progress of a run.

    Attributes:
        losses: The loss of every iteration.
        seconds: The time spent on training, over all parts of an interrupted run.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def recent_loss(self) -> float:
        recent = self.losses[-LOSS_WINDOW:]
        return sum(recent) / max(len(recent), 1)


class Trainer:
    """One run: the model, its optimizer and moving average, and their checkpoints."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.progress = Progress()
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.model: FluxTransformer2DModel = build_transformer().train()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
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

    def iterate(self) -> None:
        """Trains on one batch: computes the gradient, and updates the weights and their moving average."""
        started = time.perf_counter()
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.progress.losses.append(loss.item())
        self.progress.seconds += time.perf_counter() - started

    def save_checkpoint(self, path: Path) -> None:
        """Writes a checkpoint for `load_checkpoint`. If the process crashes meanwhile, the previous file remains."""
        partial = path.with_suffix(".partial")
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {
            "recipe": asdict(self.recipe),
            "progress": asdict(self.progress),
            "generator": self.generator.get_state(),
        }
        torch.save(state, partial)
        os.replace(partial, path)

    def load_checkpoint(self, path: Path) -> None:
        """Restores the state at the time of `save_checkpoint`.

        Raises:
            ValueError: The checkpoint belongs to another recipe.
        """
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"{path} was written with {state['recipe']}, but this run uses {asdict(self.recipe)}. "
                "Pass the same options to continue from it, or delete it to start again."
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.progress = Progress(**state["progress"])
        self.generator.set_state(state["generator"])

    def save_weights(self, path: Path) -> None:
        """Writes the averaged weights in float16, and a JSON file that describes how they were trained."""
        state = self.ema.module.state_dict()
        save_file({name: value.half().contiguous() for name, value in state.items()}, path)
        record = {
            **asdict(self.recipe),
            "final_loss": round(self.progress.recent_loss, 4),
            "final_loss_is": f"mean over the last {LOSS_WINDOW} iterations",
            "first_loss": round(self.progress.losses[0], 4),
            "training_minutes": round(self.progress.seconds / 60, 1),
            "torch_threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "stored_as": "float16",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "scikit-learn": sklearn.__version__,
            },
        }
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")

    def _parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler]:
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "schedule": self.schedule}


def load_data() -> tuple[Tensor, Tensor]:
    """Returns the 1797 images, float32 [N, 8, 8] in [-1, 1], and their classes, int64 [N]."""
    digits = load_digits()
    # The file contains gray levels from 0 to 16.
    return torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target, dtype=torch.int64)


def train(trainer: Trainer, checkpoint: Path) -> bool:
    """Trains to the end of the recipe. Returns False if Ctrl-C stopped it earlier."""
    stop = False

    def request_stop(*_: object) -> None:
        # Stopping within an iteration could update the optimizer without the average.
        nonlocal stop
        stop = True

    previous = signal.signal(signal.SIGINT, request_stop)
    losses, total = trainer.progress.losses, trainer.recipe.iterations
    try:
        with tqdm(total=total, initial=len(losses), desc="training", unit="it", smoothing=0.05) as bar:
            while len(losses) < total and not stop:
                trainer.iterate()
                bar.update()
                bar.set_postfix(loss=f"{trainer.progress.recent_loss:.3f}", refresh=False)
                if len(losses) % CHECKPOINT_EVERY == 0:
                    trainer.save_checkpoint(checkpoint)
    finally:
        signal.signal(signal.SIGINT, previous)
    trainer.save_checkpoint(checkpoint)
    return len(losses) == total


def parse_arguments() -> argparse.Namespace:
    """Parses the command line. Some fields of `Recipe` are options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="file for the weights; a .json file is written next to it"
    )
    parser.add_argument("--checkpoint", type=Path, default=WEIGHTS.with_name("checkpoint.pt"))
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--iterations", type=int, default=Recipe().iterations)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(Recipe(seed=arguments.seed, iterations=arguments.iterations))
    if arguments.checkpoint.exists():
        trainer.load_checkpoint(arguments.checkpoint)
    if not train(trainer, arguments.checkpoint):
        print(f"stopped; the same command continues from {arguments.checkpoint}")
        return
    trainer.save_weights(arguments.out)
    arguments.checkpoint.unlink()  # So that the next run starts from scratch.
    print(f"final loss {trainer.progress.recent_loss:.4f}, weights in {arguments.out}")


if __name__ == "__main__":
    main()
