"""The description of a transformer from which a test runs it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachedit_fx.functors import PatchFunctor

NUM_BLOCKS = 4  # In every block list.
BATCH = 2
SIDES = (4, 6, 8)  # Image tokens per side, by `size`.
LENGTHS = (7, 9)  # Text tokens, by `text`; all differ from the numbers of image tokens.
TIMES = (900.0, 800.0, 700.0)  # The timesteps of a generation, on a scale from 0 to 1000.

DUAL = ("encoder_hidden_states", "hidden_states")
IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
SINGLE = ("hidden_states",)

Inputs = dict[str, Any]
Cut = tuple[int, int]  # Fn_compute_blocks, Bn_compute_blocks
Block = tuple[tuple[nn.Module, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Setting:
    """The setting of a call.

    Attributes:
        timestep: The timestep on a scale from 0 to 1000.
        size, text: Indices of an image size and of a text length.
        dtype: The dtype of the floating-point inputs, except for those that pipelines leave in float32.
    """

    timestep: float = 500.0
    size: int = 0
    text: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def side(self) -> int:
        """Number of image tokens per side."""
        return SIDES[self.size]

    @property
    def length(self) -> int:
        """Number of text tokens."""
        return LENGTHS[self.text]

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        return noise(*shape, seed=seed).to(self.dtype)

    def noises(self, count: int, *shape: int) -> list[Tensor]:
        return [self.noise(*shape, seed=i) for i in range(count)]

    def floats(self, scale: float = 1.0, count: int = BATCH) -> Tensor:
        """The timestep in the inputs' dtype, [count]."""
        return torch.full((count,), self.timestep * scale).to(self.dtype)

    def integers(self, count: int = BATCH) -> Tensor:
        """The timestep as int64, [count]."""
        return torch.full((count,), int(self.timestep))


@dataclass(frozen=True)
class Variant:
    """One transformer in one configuration, and how it is called.

    Attributes:
        name: Key in `VARIANTS`.
        kind: The transformer's class.
        config: Its configuration.
        lists: Path of every block list of the chain in execution order -> the outputs of its blocks, in order; each
            output is also the name of a parameter of the blocks.
        call: Creates the arguments of a call, in new tensors; `return_dict` is added.
        latents: Names of the arguments that change from step to step, besides `times`.
        times: Names of the arguments that hold the timestep.
        timestep_input: Where the timestep is found for the graph with the block loop: in the inputs of the graph; only
            in those of the model, because of a graph break before the loop; or nowhere.
        functor: The patch functor with which the model is captured as one graph.
        needs_capture: Whether the loop is captured only with Dynamo's flags for sizes that depend on data.
        needs_call: Whether it must be called once before it is compiled, to create tables that cause a graph break.
        alternates: Whether the lists alternate: a block of the chain consists of one block of each list.
        cuts: Values of Fn and Bn that are tested in addition to those for all variants.
        refused: Cuts that are refused, because a number that is read from a stream would be needed on both sides.
        image_last: If two streams are joined, whether the text comes first.
        dtype: The dtype in which `tests/test_zoo.py` runs it.
    """

    name: str
    kind: type[nn.Module]
    config: dict[str, Any]
    lists: dict[str, tuple[str, ...]]
    call: Callable[[Setting], Inputs]
    latents: tuple[str, ...] = ("hidden_states",)
    times: tuple[str, ...] = ("timestep",)
    timestep_input: Literal["graph", "model", "none"] = "graph"
    functor: type[PatchFunctor] | None = None
    needs_capture: bool = False
    needs_call: bool = False
    alternates: bool = False
    cuts: tuple[tuple[int, int], ...] = ()
    refused: tuple[tuple[int, int], ...] = ()
    image_last: bool = True
    dtype: torch.dtype = torch.bfloat16

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new transformer, always with the same weights, in which every block has an effect."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = self.kind(**self.config).eval()
            for name, parameter in model.named_parameters():
                # Gates and output projections are initialized to 0, and LuminaNext's padding is uninitialized memory.
                if parameter.numel() > 1 and (name == "pad_token" or not parameter.any()):
                    parameter.normal_(0, 0.02)
        return cast(model, dtype)

    def chain(self, model: nn.Module) -> list[Block]:
        """The blocks of `model` in execution order: the modules of each, and the names of its outputs."""
        lists = [(model.get_submodule(path), returns) for path, returns in self.lists.items()]
        if self.alternates:
            return [(modules, lists[0][1]) for modules in zip(*(blocks for blocks, _ in lists), strict=True)]
        return [((block,), returns) for blocks, returns in lists for block in blocks]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the chain."""
        counts = [self._count(path) for path in self.lists]
        return counts[0] if self.alternates else sum(counts)

    def _count(self, path: str) -> int:
        return 2 * NUM_BLOCKS if (self.name, path) == ("HunyuanDiT", "blocks") else NUM_BLOCKS

    def inputs(
        self, timestep: float = 500.0, *, size: int = 0, text: int = 0, dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """The arguments of a call, in new tensors."""
        inputs = self.call(Setting(timestep, size, text, dtype))
        takes_dict = "return_dict" in inspect.signature(self.kind.forward).parameters
        return inputs | ({"return_dict": False} if takes_dict else {})

    def generation(
        self, times: Sequence[float] = TIMES, *, size: int = 0, text: int = 0, dtype: torch.dtype = torch.float32
    ) -> list[Inputs]:
        """The calls of a generation: new latents and another timestep in each, the same objects for all else."""
        settings = dict(size=size, text=text, dtype=dtype)
        common = self.inputs(times[0], **settings)
        calls = []
        for number, time in enumerate(times):
            step_inputs = self.inputs(time, **settings)
            latents = {
                name: pytree.tree_map(lambda x, n=number: another(x, n), step_inputs[name]) for name in self.latents
            }
            calls.append(common | {name: step_inputs[name] for name in self.times} | latents)
        return calls


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Unit Gaussian values, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def another(latents: Tensor, seed: int) -> Tensor:
    """Other latents of the same shape and dtype; integer latents are token ids below 16."""
    if latents.is_floating_point():
        return noise(*latents.shape, seed=seed).to(latents.dtype)
    return torch.randint(16, latents.shape, generator=torch.Generator().manual_seed(seed))


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` with its weights in `dtype`, except for those that diffusers loads in float32."""
    float32_modules = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        persists = name in model.state_dict()
        if tensor.is_floating_point() and persists and not float32_modules & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model
