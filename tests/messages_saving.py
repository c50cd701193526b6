"""The rows of `messages_table` about `save_compiled` and `load_compiled`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import cachedit_fx
from tests import hybrid, tiny
from tests.messages_table import Row


def enabled(**fields: Any) -> Any:
    return cachedit_fx.enable_cache(tiny.build(), **(tiny.fields(inner_backend="eager") | fields))


def step(model: Any) -> None:
    tiny.step(model, tiny.prompt(), 0.5, tiny.latents())


def load_elsewhere(folder: Path, **fields: Any) -> None:
    """Saves the graphs of a model that runs without gradients, and runs them with gradients."""
    saved, loaded = enabled(), enabled(**fields)
    with torch.no_grad():
        step(saved)
    cachedit_fx.save_compiled(saved, folder / "file")
    cachedit_fx.load_compiled(loaded, folder / "file")
    step(loaded)


ROWS = [
    Row(
        "compiled-file-missing",
        lambda folder: cachedit_fx.load_compiled(enabled(), folder / "none"),
        "FileNotFoundError",
        "What to do: call cachedit_fx.save_compiled in a process of this kind.",
    ),
    Row(
        "compiled-not-saved",
        lambda folder: cachedit_fx.save_compiled(hybrid.build(), folder / "file"),
        "enable_cache was not called for it",
        "What to do: nothing, if that is fast enough.",
    ),
    Row(
        "compiled-refused",
        lambda folder: load_elsewhere(folder, Fn_compute_blocks=2),
        "other arguments of enable_cache",
        "What to do: call cachedit_fx.save_compiled again",
    ),
    Row(
        "compiled-not-restored",
        load_elsewhere,
        "a value differs: grad_mode=True; saved: grad_mode=False\nWhat to do",
        "the saved graphs of this Transformer are not used",
    ),
]
