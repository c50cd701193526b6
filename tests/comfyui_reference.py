"""A run of a sampler whose reused steps are made by hand, and what the tests of ComfyUI share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tests.comfyui_simulation import Conditioning, DiffusionModel, Executor, ModelPatcher, apart, build, sample
from tests.researchers.port_reference import Port, PortReference
from tests.sessions import every_session

REUSED = [2, 3, 5, 6]  # Of eight steps, after two warm-up steps, with at most two reused steps in a row.
PORT = Port((("img",), ("txt",)), ((0,), (1,)))


def model_of(patcher: ModelPatcher) -> DiffusionModel:
    return patcher.get_model_object("diffusion_model")


def prompts(**extra: Any) -> list[Conditioning]:
    return [Conditioning(1, 0, extra=extra), Conditioning(2, 1, extra=extra)]


def by_hand(
    conditionings: list[Conditioning],
    reused: Iterable[int] = REUSED,
    *,
    patcher: ModelPatcher | None = None,
    num_fn_blocks: int = 1,
    **kwargs: Any,
) -> Tensor:
    """A run that calls the model for one conditioning after the other.

    Args:
        reused: The numbers of the calls of each conditioning that skip all blocks but the first `num_fn_blocks`.
        patcher: A model without a cache; by default a new one.
    """
    patcher = (patcher or build()).clone()
    model, calls = model_of(patcher), Counter()
    references = {
        (one.kind, one.uuid): PortReference(model, [*model.double_blocks], PORT, num_fn_blocks, 0)
        for one in conditionings
    }

    def apply_model(executor: Executor, *args: Any, **kwargs: Any) -> Tensor:
        key = args[5]["cond_or_uncond"][0], args[5]["uuids"][0]
        calls[key] += 1
        return references[key].step(lambda _: executor(*args, **kwargs), reuse=calls[key] - 1 in reused)

    patcher.add_wrapper_with_key("apply_model", "by hand", apply_model)
    return sample(patcher, conditionings, batches=apart, **kwargs)


def steps_of(patcher: ModelPatcher) -> list[tuple[int, list[int]]]:
    """The number of steps and the reused ones of each session of a model, in the order of their first steps."""
    return [(stats.num_steps, stats.cached_steps) for stats in every_session(model_of(patcher))]
