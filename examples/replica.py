"""One compiled diffusers pipeline that serves requests one after the other. `serve_ray.py` puts several behind HTTP."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import cachedit_fx
from examples.digits.model import IMAGE_SIDE, build_pipeline, class_conditioning, load_transformer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Event = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        prompt: The text. With the digits model, the name of a digit: "seven" or "7".
        height: Height of the image in pixels; None for the size that the model was trained on.
        width: Width of the image in pixels; None likewise.
        seed: Determines the noise.
        steps: The number of denoising steps.
        id: A name by which the request can be cancelled.

    Raises:
        ValueError: A number is not allowed.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    seed: int = 0
    steps: int = 28
    id: str = ""

    def __post_init__(self) -> None:
        for name, most in (("height", 4096), ("width", 4096), ("steps", 1000)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {value}")


class DigitsModel:
    """The trained model of `examples/digits`, in the FluxPipeline of diffusers."""

    def __init__(self) -> None:
        self.pipe = build_pipeline(load_transformer())

    def arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of the pipeline's call.

        Raises:
            ValueError: The model cannot serve the request.
        """
        words = request.prompt.lower().split()
        found = [digit for digit, name in enumerate(DIGITS) if name in words or str(digit) in words]
        if len(found) != 1:
            raise ValueError(f"the prompt must name one digit ({', '.join(DIGITS)}), got {request.prompt!r}")
        height, width = self._size(request)
        if height % 2 or width % 2:
            raise ValueError(f"height and width must be even, got {height} and {width}")
        tokens, pooled = class_conditioning(torch.tensor(found))
        # The pipeline divides the size by 8, the scale of the autoencoder, which it does not have here.
        size = dict(height=8 * height, width=8 * width)
        return dict(prompt_embeds=tokens, pooled_prompt_embeds=pooled, output_type="latent", **size)

    def pixels(self, images: torch.Tensor, request: Request) -> np.ndarray:
        """The pixels of the image, float32 [height, width] in [0, 1], from tokens, [1, height * width / 4, 4]."""
        height, width = self._size(request)
        patches = images.reshape(height // 2, width // 2, 2, 2)
        image = patches.permute(0, 2, 1, 3).reshape(height, width)
        return ((image.clamp(-1, 1) + 1) / 2).numpy()

    def _size(self, request: Request) -> tuple[int, int]:
        return request.height or IMAGE_SIDE, request.width or IMAGE_SIDE


class DiffusersModel:
    """A text-to-image pipeline of diffusers, from a folder or the Hugging Face Hub."""

    def __init__(self, model: str) -> None:
        from diffusers import DiffusionPipeline

        has_gpu = torch.cuda.is_available()
        self.pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
        self.pipe.to("cuda" if has_gpu else "cpu")

    def arguments(self, request: Request) -> dict[str, Any]:
        return dict(prompt=request.prompt, height=request.height, width=request.width, output_type="np")

    def pixels(self, images: np.ndarray, _request: Request) -> np.ndarray:
        """The pixels of the image, float32 [height, width, 3] in [0, 1]."""
        return images[0]


@dataclass(frozen=True)
class Outcome:
    """How a request ended: "done", "cancelled", "refused" or "failed", and what the cache did for it.

    Attributes:
        calls: The numbers of transformer calls that were "computed", "reused" and "uncached".
        decisions: One entry per region and guidance branch, with the reason of the decision at every step.
    """

    outcome: str
    seconds: float
    calls: dict[str, int]
    decisions: list[dict[str, Any]]


class Cancelled(Exception):
    """Ends a generation from inside, between two steps."""


class Replica:
    """A compiled pipeline, and the thread that runs it.

    Args:
        model: A pipeline of diffusers; empty for the digits model.
        is_cached: Whether `cachedit_fx.enable_cache` compiles the transformer, or `torch.compile` alone.
        inner_backend: The `torch.compile` backend.
        artifacts: A file with the compiled code of another replica. If it exists, it is loaded instead of compiling.
        first: The request that is served at the start, for which the model is compiled.
        threads: The number of CPU threads of torch. The tensors of the digits model are too small for several.

    Attributes:
        observe: Is called with the outcome of every request, in the thread of the replica.
        start_seconds: The time that the start took.
        stall_seconds: A generation that makes no step for this time counts as stalled.
    """

    def __init__(
        self,
        model: str = "",
        *,
        is_cached: bool = True,
        inner_backend: str = "inductor",
        artifacts: Path | None = None,
        first: Request = Request("zero"),
        threads: int = 1,
    ) -> None:
        started = time.perf_counter()
        self.observe: Callable[[Outcome], None] = lambda _: None
        self.stall_seconds = 300.0
        self._error: Exception | None = None
        self._last_step: float | None = None  # The time of the last step; None if nothing runs.
        self._model = DiffusersModel(model) if model else DigitsModel()
        self.pipe = self._model.pipe
        self.pipe.set_progress_bar_config(disable=True)
        # One graph serves all sizes, so that an image does not depend on the sizes that were requested before.
        if is_cached:
            fields = dict(residual_diff_threshold=0.2, inner_backend=inner_backend)
            cachedit_fx.enable_cache(self.pipe, dynamic=True, **fields)
        else:
            self.pipe.transformer.compile(dynamic=True, backend=inner_backend)
        if artifacts is not None and artifacts.is_file():
            cachedit_fx.load_compiled(self.pipe, artifacts)
        # One thread runs everything: the number of threads and CUDA graphs belong to the thread that compiled.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.generate(first)
        self.start_seconds = time.perf_counter() - started

    def save(self, path: Path) -> int:
        """Writes what was compiled, and returns the size of the file in bytes."""
        self._thread.submit(cachedit_fx.save_compiled, self.pipe, path).result()  # Guards depend on the thread.
        return path.stat().st_size

    def generate(self, request: Request) -> Event:
        """Serves one request, and returns the result.

        Raises:
            ValueError: The model cannot serve the request.
        """
        return self._thread.submit(self._generate, request).result()

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Yields an event after every step, then the result.

        If the iteration is cancelled or closed, the generation stops at its next step.

        Raises:
            ValueError: The model cannot serve the request.
        """
        loop, is_cancelled = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = loop.run_in_executor(self._thread, self._generate, request, emit, is_cancelled)
        job.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield job.result()
        finally:
            is_cancelled.set()

    def check_health(self) -> None:
        """Raises a RuntimeError if the last generation failed, or if the running one is stalled."""
        last_step = self._last_step
        if last_step is not None and time.monotonic() - last_step > self.stall_seconds:
            raise RuntimeError(f"the running generation has made no step for more than {self.stall_seconds} s")
        if self._error is not None:
            raise RuntimeError("the last generation failed") from self._error

    def _generate(
        self, request: Request, emit: Callable[[Event], None] = lambda _: None, is_cancelled: Any = None
    ) -> Event:
        """Generates one image, in the thread of this replica."""
        started, before, outcome = time.perf_counter(), self._calls(), "failed"

        def on_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._last_step = time.monotonic()
            emit({"step": step + 1, "steps": request.steps, "seconds": round(time.perf_counter() - started, 3)})
            if is_cancelled is not None and is_cancelled.is_set():
                raise Cancelled
            return tensors

        self._last_step = time.monotonic()
        image: Event = {}
        try:
            if is_cancelled is not None and is_cancelled.is_set():  # It was cancelled while it waited.
                raise Cancelled
            arguments = self._model.arguments(request)
            generator = torch.Generator().manual_seed(request.seed)
            steps = dict(num_inference_steps=request.steps, callback_on_step_end=on_step)
            images = self.pipe(**arguments, **steps, generator=generator).images
            image = encoded(self._model.pixels(images, request))
            outcome, self._error = "done", None
        except Cancelled:
            outcome = "cancelled"
        except ValueError:
            outcome = "refused"
            raise
        except Exception as error:
            self._error = error
            raise
        finally:
            self._last_step = None
            calls = {name: number - before[name] for name, number in self._calls().items()}
            decisions = self._decisions() if any(calls.values()) else []
            ended = Outcome(outcome, round(time.perf_counter() - started, 3), calls, decisions)
            self.observe(ended)
        return {"id": request.id, **dataclasses.asdict(ended), **image}

    def _calls(self) -> dict[str, int]:
        """How all calls of the transformers were served since the start."""
        counts = cachedit_fx.summary(self.pipe, logging=False).calls.values()
        return {name: sum(getattr(one, name) for one in counts) for name in ("computed", "reused", "uncached")}

    def _decisions(self) -> list[dict[str, Any]]:
        fields = ("module", "region", "session", "cached_steps", "decisions")
        return [{f: getattr(e, f) for f in fields} for e in cachedit_fx.summary(self.pipe, logging=False)]


def encoded(pixels: np.ndarray) -> Event:
    """The image as a PNG in base64, and the SHA-256 of its pixels, which are floats in [0, 1]."""
    image = Image.fromarray((255 * pixels).round().astype(np.uint8))
    if max(image.size) < 64:
        image = image.resize((16 * image.width, 16 * image.height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return {"image": base64.b64encode(file.getvalue()).decode(), "sha256": digest}
