"""The parts of ComfyUI that call a model, in the shape of its samplers, and a diffusion model in the shape of its FLUX.

A sampler concatenates the conditionings into new tensors at every step, passes `transformer_options`, and calls the
model through the wrappers that nodes have registered. Which conditionings are in one batch, and in which order, is an
argument here: in ComfyUI it depends on the free memory.
"""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, CHANNELS, SIDE, DEPTH = 16, 2, 4, 4, 4
SIGMAS = torch.linspace(1, 0, 9)

Batches = Callable[[int, list[int]], list[list[int]]]  # Step, the conditionings -> those of each call, in order.


class Executor:
    """Calls the wrappers around a function, each of which gets an executor for the rest."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: Sequence[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, [*wrappers]

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)

    __call__ = execute


def wrappers_of(options: dict[str, Any], kind: str) -> list[Callable[..., Any]]:
    return [one for found in options.get("wrappers", {}).get(kind, {}).values() for one in found]


class Block(nn.Module):
    """img [B, N, D], txt [B, T, D], vec [B, D] -> img, txt; one of the additions is in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(DIM, 2 * DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, transformer_options: dict[str, Any]) -> tuple[Tensor, ...]:
        scale, gate = self.mod(F.silu(vec))[:, None].chunk(2, dim=-1)
        joint = (1 + scale) * self.norm(torch.cat([txt, img], 1))
        q, k, v = self.qkv(joint).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + gate * self.proj(img_attended)
        txt += gate * self.proj(txt_attended)
        return img, txt


class DiffusionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4 * CHANNELS, DIM), nn.Linear(6, DIM)
        self.time_in, self.y_in = nn.Linear(8, DIM), nn.Linear(3, DIM)
        self.double_blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.final = nn.Linear(DIM, 4 * CHANNELS)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options", {})
        executor = Executor(self._forward, self, wrappers_of(options, "diffusion_model"))
        return executor.execute(x, timestep, context, y, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        control: dict[str, list[Tensor]] | None = None,
        ref_latents: list[Tensor] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - As in ComfyUI.
    ) -> Tensor:
        angles = timestep[:, None] * torch.arange(1, 5)
        vec = self.time_in(torch.cat([angles.cos(), angles.sin()], -1)) + self.y_in(y)
        img, txt = self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)), self.txt_in(context)
        for latents in ref_latents or []:
            img = img + self.img_in(F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2))
        transformer_options["total_blocks"] = len(self.double_blocks)
        for i, block in enumerate(self.double_blocks):
            transformer_options["block_index"] = i
            img, txt = block(img=img, txt=txt, vec=vec, transformer_options=transformer_options)
            if control is not None and i < len(control["input"]):
                img[:, : control["input"][i].shape[1]] += control["input"][i]
        out = self.final(img).transpose(1, 2).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))
        return F.pixel_shuffle(out, 2)


@dataclass(frozen=True)
class ModelSampling:
    """The noise schedule of a flow model: sigma falls from 1 to 0, by a curve that depends on the shift."""

    shift: float = 1.0

    def percent_to_sigma(self, percent: float) -> float:
        remaining = 1 - percent
        return self.shift * remaining / (1 + (self.shift - 1) * remaining)


class BaseModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = DiffusionModel()
        self.model_sampling = ModelSampling()

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, control: Any = None, **kwargs: Any) -> Any:
        options = kwargs.pop("transformer_options", {})
        executor = Executor(self._apply_model, self, wrappers_of(options, "apply_model"))
        return executor.execute(x, t, None, c_crossattn, control, options, **kwargs)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: None, c_crossattn: Tensor, control: Any, options: Any, **kwargs: Any
    ) -> Tensor:
        kwargs |= dict(context=c_crossattn, control=control, transformer_options=options)
        return self.diffusion_model(x, t.float(), **kwargs)


class ModelPatcher:
    """What a node receives as MODEL. Clones share the model; each has wrappers and patches of its own.

    Attributes:
        patches: The name of a weight of the model -> what is added to it while the model is loaded (a LoRA adapter).
        object_patches: The name of an attribute of the model -> what replaces it while the model is loaded.
    """

    def __init__(self, model: BaseModel) -> None:
        self.model: Any = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches: dict[str, Tensor] = {}
        self.object_patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}  # Shared by all clones, as the model is.

    def clone(self) -> ModelPatcher:
        new = ModelPatcher(self.model)
        wrappers = self.model_options["transformer_options"].get("wrappers", {})
        new.model_options = {**self.model_options, "transformer_options": {}}
        new.model_options["transformer_options"]["wrappers"] = {
            kind: {key: [*found] for key, found in keyed.items()} for kind, keyed in wrappers.items()
        }
        new.patches, new.object_patches, new.backup = {**self.patches}, {**self.object_patches}, self.backup
        return new

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.model_options["transformer_options"].get("wrappers", {}).get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable[..., Any]]:
        return [*self.model_options["transformer_options"].get("wrappers", {}).get(kind, {}).get(key, [])]

    def set_model_unet_function_wrapper(self, wrapper: Callable[..., Any]) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def add_patches(self, patches: dict[str, Tensor]) -> None:
        self.patches |= patches

    def load(self) -> None:
        """Replaces the patched weights by new parameters, and attributes by their patches."""
        self.unload()
        for name, added in self.patches.items():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            self.backup[name] = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(self.backup[name] + added, requires_grad=False))
        for name, value in self.object_patches.items():
            self.backup[name] = getattr(self.model, name)
            setattr(self.model, name, value)

    def unload(self) -> None:
        for name, value in self.backup.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, value)
        self.backup.clear()


@dataclass
class Conditioning:
    """An encoded prompt. `kind` is 0 for a positive and 1 for a negative one."""

    seed: int
    kind: int
    length: int = 5
    uuid: Any = field(default_factory=uuid.uuid4)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.context = torch.randn(1, self.length, 6, generator=generator)
        self.y = torch.randn(1, 3, generator=generator)

    def for_batch(self, size: int) -> dict[str, Any]:
        return {"c_crossattn": self.context.repeat(size, 1, 1), "y": self.y.repeat(size, 1), **self.extra}


def concatenated(parts: Sequence[Any]) -> Any:
    """How ComfyUI joins the same argument of several conditionings: tensors in lists and dicts are concatenated."""
    if isinstance(parts[0], Tensor):
        return torch.cat([*parts])
    if isinstance(parts[0], dict):
        return {name: concatenated([part[name] for part in parts]) for name in parts[0]}
    return [*map(concatenated, zip(*parts, strict=True))]


def one_batch(_step: int, found: list[int]) -> list[list[int]]:
    return [found[::-1]]


@dataclass(frozen=True)
class Solver:
    """A sampler. With `midpoint`, it calls the model a second time per step, at a sigma between two steps."""

    midpoint: bool = False

    def sample(self, denoise: Callable[[int, Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            flow = denoise(step, x, sigma)
            if self.midpoint:
                middle = (sigma + next_sigma) / 2
                flow = denoise(step, x + flow * (middle - sigma), middle)
            x = x + flow * (next_sigma - sigma)
        return x


def sample(
    patcher: ModelPatcher,
    conditionings: Sequence[Conditioning],
    *,
    batches: Batches = one_batch,
    batch_size: int = 1,
    seed: int = 5,
    sigmas: Tensor = SIGMAS,
    solver: Solver = Solver(),
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """One run of a sampler: the final latents. A guider of guidance scale 3 combines the conditionings."""
    options = copy.copy(patcher.model_options["transformer_options"])

    def outer_sample(noise: Tensor, latent_image: Tensor, sampler: Solver, sigmas: Tensor, *_: Any) -> Tensor:
        patcher.load()

        def denoise(step: int, x: Tensor, sigma: Tensor) -> Tensor:
            on_step(step)
            outputs: dict[int, Tensor] = {}
            for chosen in batches(step, [*range(len(conditionings))]):
                mine = [conditionings[i] for i in chosen]
                arguments = [one.for_batch(batch_size) for one in mine]
                given = {name: concatenated([one[name] for one in arguments]) for name in arguments[0]}
                given["transformer_options"] = options | dict(
                    cond_or_uncond=[one.kind for one in mine],
                    uuids=[one.uuid for one in mine],
                    sigmas=sigma[None],
                    sample_sigmas=sigmas,
                )
                output = _apply(patcher, torch.cat([x] * len(mine)), sigma.repeat(batch_size * len(mine)), given)
                outputs |= zip(chosen, output.chunk(len(mine)), strict=True)
            return guided([outputs[i] for i in range(len(conditionings))])

        return sampler.sample(denoise, latent_image + noise, sigmas)

    noise = torch.randn(batch_size, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        arguments = (noise, torch.zeros_like(noise), solver, sigmas.clone(), None, None, True, seed)
        return Executor(outer_sample, patcher, wrappers_of(options, "outer_sample")).execute(*arguments)


def _apply(patcher: ModelPatcher, x: Tensor, times: Tensor, given: dict[str, Any]) -> Tensor:
    wrapper = patcher.model_options.get("model_function_wrapper")
    if wrapper is None:
        return patcher.model.apply_model(x, times, **given)
    cond_or_uncond = given["transformer_options"]["cond_or_uncond"]
    arguments = {"input": x, "timestep": times, "c": given, "cond_or_uncond": cond_or_uncond}
    return wrapper(patcher.model.apply_model, arguments)


def guided(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else outputs[-1] + 3 * (sum(outputs[:-1]) - outputs[-1])


def build() -> ModelPatcher:
    """Always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelPatcher(BaseModel().eval().requires_grad_(False))


def apart(_step: int, found: Iterable[int]) -> list[list[int]]:
    return [[one] for one in found]
