"""Names that decide: which arguments and variables of a model are its timestep, its conditioning, or rebuilt.

The dataflow decides wherever it can. These names decide where it cannot: an argument that a model only passes on, or
inputs that the graph treats alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The whole name of a timestep input, the most specific first: if a model has several of these arguments, the first
# pattern that matches one of them decides.
TIMESTEP_NAMES = (
    r"timesteps?",  # diffusers.
    r"t",  # The research code of DiT, SiT and their successors.
    r"sigmas?",  # Models that are conditioned on the noise level (EDM).
    r"time",  # Research code.
    r"[a-z]+_timesteps?",  # For example `video_timestep`.
)

# Words in the name of an argument that carries the conditioning. They are searched anywhere in the name.
CONDITIONING_WORDS = (
    r"encoder_hidden_states",  # diffusers.
    r"prompt",  # `prompt_embeds`, `pooled_prompt`.
    r"context",  # Wan and other video models.
    r"cap",  # `cap_feats`: captions, as in Lumina and PixArt.
    r"text",
    r"txt",  # FLUX.
    r"clip",  # Embeddings by CLIP.
    r"t5",  # Embeddings by T5.
    r"cond",  # `cond`, `conditioning`.
    r"label",  # Class labels.
    r"class",
)

# Words in the name of an input that denoising loops rebuild at every step. The identity of such an input does not
# distinguish requests, also if its name contains a word of `CONDITIONING_WORDS` (`encoder_hidden_states_mask`).
REBUILT_WORDS = (
    r"mask",  # Attention masks.
    r"ids$",  # Position ids (`txt_ids`).
    r"guidance",  # The guidance scale as a tensor.
    r"control",  # Residuals of a ControlNet.
    r"rotary",  # Rotary tables.
    r"freqs",  # Rotary tables.
    r"timestep",
    r"sigma",
    r"scale",
    r"shape",
    r"size",
)

_CONDITIONING = re.compile("|".join(CONDITIONING_WORDS), re.IGNORECASE)
_REBUILT = re.compile("|".join(REBUILT_WORDS), re.IGNORECASE)


def without_number(name: str) -> str:
    """The name without the number that Dynamo appends to make it unique: `hidden_states` for `hidden_states_47`."""
    return re.sub(r"_\d+$", "", name)


def timestep_name(names: Iterable[str]) -> str | None:
    """The name of the timestep among the arguments of a model's forward; None if there is none."""
    ordered = list(names)
    found = (name for pattern in TIMESTEP_NAMES for name in ordered if re.fullmatch(pattern, name))
    return next(found, None)


def conditioning_names(names: Iterable[str]) -> tuple[str, ...]:
    """Those arguments of a model's forward that may distinguish requests and guidance branches, in their order."""
    return tuple(name for name in names if is_conditioning_name(name) and not is_rebuilt_name(name))


def is_conditioning_name(name: str) -> bool:
    return _CONDITIONING.search(name) is not None


def is_rebuilt_name(name: str) -> bool:
    """Whether a denoising loop rebuilds an input of this name at every step."""
    return _REBUILT.search(name) is not None
