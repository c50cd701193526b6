"""Trains the clip model from scratch: a rectified flow on clips that are drawn during training.

    python examples/clips/train.py

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
import numpy as np
import torch
import transformers
from captions import BLURRY, caption_of, random_scenes
from diffusers import WanTransformer3DModel
from draw import blur, draw_clips
from model import FLOW_SHIFT, WEIGHTS, build_transformer, latents_of
from safetensors.torch import save_file
from text import build_tokenizer, encode, train_text_encoder
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

CHECKPOINT_EVERY = 100  # Iterations.
LOSS_WINDOW = 200  # Number of iterations over which a displayed or recorded loss is averaged.


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


@dataclass(slots=True)
class Progress:
    """The progress of a run.

    Attributes:
        losses: The loss of every iteration.
        seconds: The CPU time spent on training, over all parts of an interrupted run.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def recent_loss(self) -> float:
        recent = self.losses[-LOSS_WINDOW:]
        return sum(recent) / max(len(recent), 1)


class Trainer:
    """One run: the text encoder, the transformer with its optimizer and moving average, and their checkpoints."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.progress = Progress()
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.tokenizer = build_tokenizer()
        self.text_encoder = train_text_encoder(self.tokenizer, recipe.text_iterations, self.generator)
        self.model: WanTransformer3DModel = build_transformer().train()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
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

    def iterate(self) -> None:
        """Trains on one batch: computes the gradient, and updates the weights and their moving average."""
        started = time.process_time()
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.progress.losses.append(loss.item())
        self.progress.seconds += time.process_time() - started

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
        parts = {"transformer": self.ema.module, "text_encoder": self.text_encoder}
        state = {f"{part}.{name}": v for part, module in parts.items() for name, v in module.state_dict().items()}
        save_file({name: value.half().contiguous() for name, value in state.items()}, path)
        record = {
            **asdict(self.recipe),
            "iterations": self.recipe.iterations,
            "final_loss": round(self.progress.recent_loss, 4),
            "final_loss_is": f"mean over the last {LOSS_WINDOW} iterations",
            "first_loss": round(self.progress.losses[0], 4),
            "training_cpu_minutes": round(self.progress.seconds / 60, 1),
            "torch_threads": torch.get_num_threads(),
            "parameters": self.model.num_parameters(),
            "text_encoder_parameters": self.text_encoder.num_parameters(),
            "stored_as": "float16",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        }
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")

    def _parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler]:
        return {
            "text_encoder": self.text_encoder,
            "model": self.model,
            "ema": self.ema,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }


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
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(Recipe(seed=arguments.seed))
    trainer.model.compile_repeated_blocks()
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
