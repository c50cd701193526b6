"""The training that the examples share: one iteration, checkpoints, and a loop that Ctrl-C stops.

The checkpoint contains the state of the random generator, so an interrupted run results in the same weights as an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

LOSS_WINDOW = 200  # Number of iterations over which a displayed or recorded loss is averaged.


class Recipe(Protocol):
    """What every recipe contains; it is a dataclass."""

    __dataclass_fields__: Any
    seed: int
    ema_decay: float
    gradient_norm: float

    @property
    def iterations(self) -> int: ...


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


class TrainingRun(ABC):
    """One run: the model, its optimizer and moving average, and their checkpoints.

    A subclass creates `model`, `optimizer` and `schedule`, and passes the model to `average`.

    Attributes:
        clock: Measures `Progress.seconds`.
        checkpoint_every: Number of iterations between two checkpoints.
    """

    clock: Callable[[], float] = staticmethod(time.process_time)
    checkpoint_every: int
    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.progress = Progress()
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def average(self, model: nn.Module) -> AveragedModel:
        """Returns the moving average of the weights of `model`."""
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema_decay))

    @abstractmethod
    def loss(self) -> Tensor:
        """Returns the loss of one random batch, a scalar."""

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | LRScheduler]:
        """Returns what a checkpoint contains the state of."""
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "schedule": self.schedule}

    def iterate(self) -> None:
        """Trains on one batch: computes the gradient, and updates the weights and their moving average."""
        started = self.clock()
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.progress.losses.append(loss.item())
        self.progress.seconds += self.clock() - started

    def save_checkpoint(self, path: Path) -> None:
        """Writes a checkpoint for `load_checkpoint`. If the process crashes meanwhile, the previous file remains."""
        partial = path.with_suffix(".partial")
        state = {name: part.state_dict() for name, part in self.parts().items()}
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
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.progress = Progress(**state["progress"])
        self.generator.set_state(state["generator"])

    def train(self, checkpoint: Path) -> bool:
        """Trains to the end of the recipe. Returns False if Ctrl-C stopped it earlier."""
        stop = False

        def request_stop(*_: object) -> None:
            # Stopping within an iteration could update the optimizer without the average.
            nonlocal stop
            stop = True

        previous = signal.signal(signal.SIGINT, request_stop)
        losses, total = self.progress.losses, self.recipe.iterations
        try:
            with tqdm(total=total, initial=len(losses), desc="training", unit="it", smoothing=0.05) as bar:
                while len(losses) < total and not stop:
                    self.iterate()
                    bar.update()
                    bar.set_postfix(loss=f"{self.progress.recent_loss:.3f}", refresh=False)
                    if len(losses) % self.checkpoint_every == 0:
                        self.save_checkpoint(checkpoint)
        finally:
            signal.signal(signal.SIGINT, previous)
        self.save_checkpoint(checkpoint)
        return len(losses) == total

    @abstractmethod
    def save_weights(self, path: Path) -> None:
        """Writes the weights and their description by `write_weights`."""

    def write_weights(
        self, path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        """Writes `weights` in float16, and a JSON file that describes how they were trained.

        Args:
            path: The file of the weights. The JSON file is written next to it.
            weights: The averaged weights.
            facts: What the JSON file also says, besides the recipe and the losses.
            versions: The versions of further libraries.
        """
        save_file({name: value.half().contiguous() for name, value in weights.items()}, path)
        record = {
            **asdict(self.recipe),
            "iterations": self.recipe.iterations,
            "final_loss": round(self.progress.recent_loss, 4),
            "final_loss_is": f"mean over the last {LOSS_WINDOW} iterations",
            "first_loss": round(self.progress.losses[0], 4),
            **facts,
            "torch_threads": torch.get_num_threads(),
            "stored_as": "float16",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                **versions,
            },
        }
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


def argument_parser(description: str | None, weights: Path, seed: int) -> argparse.ArgumentParser:
    """Returns a parser with the options that every training has. `weights` and `seed` are the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=weights, help="file for the weights; a .json file is written next to it"
    )
    parser.add_argument("--checkpoint", type=Path, default=weights.with_name("checkpoint.pt"))
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser


def run(trainer: TrainingRun, out: Path, checkpoint: Path) -> None:
    """Trains from the checkpoint, if there is one, and writes the weights at the end."""
    if checkpoint.exists():
        trainer.load_checkpoint(checkpoint)
    if not trainer.train(checkpoint):
        print(f"stopped; the same command continues from {checkpoint}")
        return
    trainer.save_weights(out)
    checkpoint.unlink()  # So that the next run starts from scratch.
    print(f"final loss {trainer.progress.recent_loss:.4f}, weights in {out}")
