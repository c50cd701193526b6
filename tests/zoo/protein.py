"""Transformers that generate proteins: the coordinates of a backbone and a latent of every residue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, Inputs, Setting, Variant

ATOMS = 37  # Atom slots of a residue.


def _rfd4(setting: Setting) -> Inputs:
    """One molecule with nothing prescribed. Backbone and latents have schedules of their own, from 0 to 1."""
    tokens = (8, 12, 16)[setting.size]
    shape = (BATCH, tokens)
    atoms = torch.zeros(*shape, ATOMS, dtype=torch.int64)
    position = torch.arange(tokens)
    conditioning: dict[str, Any] = {
        "is_in_context_conditioning": torch.zeros(shape, dtype=torch.bool),
        "supports_local_latent": torch.ones(shape, dtype=torch.bool),
        "token_bond_path_length": (position[:, None] - position).abs().repeat(BATCH, 1, 1),
        "molecule_iid": torch.zeros(shape, dtype=torch.int64),
        "molecule_entity_id": torch.zeros(shape, dtype=torch.int64),
        "condition_index-group_1_token": torch.zeros(shape, dtype=torch.int64),
        **{f"condition_{name}_1_atom": atoms for name in ("hbond", "pistack", "pication", "saltbridge", "hydrophobic")},
        "condition_metal-coord_1_atom": atoms,
    }
    time = 1 - setting.timestep / 1000
    return dict(
        bb_ca=setting.noise(*shape, 3).float(),
        local_latents=setting.noise(*shape, 6).float(),
        bb_ca_time=torch.full((BATCH,), time),
        local_latents_time=torch.full((BATCH,), time / 2),
        padding_mask=torch.ones(shape, dtype=torch.bool),
        token_type=torch.zeros(shape, dtype=torch.int64),
        atom37_mask=torch.ones(*shape, ATOMS, dtype=torch.bool),
        conditioning=conditioning,
        recycle_depth=1,
        attention_kwargs=None,
    )


def variants() -> Iterator[Variant]:
    yield Variant(
        name="RFD4Proteina",
        kind=diffusers.RFD4ProteinaTransformer,
        config=dict(
            nlayers=NUM_BLOCKS,
            token_dim=32,
            nheads=4,
            dim_cond=16,
            pair_repr_dim=16,
            latent_dim=6,
            token_type_emb_dim=8,
            cath_emb_dim=4,
            t_emb_dim=16,
            seq_sep_dim=8,
            xt_pair_dist_dim=6,
            tri_mult_c=8,
            num_sequence_classes=12,
        ),
        lists={"transformer_layers": ("values",)},
        call=_rfd4,
        latents=("bb_ca", "local_latents"),
        times=("bb_ca_time", "local_latents_time"),
    )
