"""Tiny diffusers transformers whose code cache-dit has to patch before it can cache them.

    model = MODELS["flux"]
    transformer, prompt = model.build(), model.arguments(seed=1)
    outputs = [transformer(**model.at(prompt, time)) for time in (0.9, 0.8)]

They are at most 64 wide and have `NUM_BLOCKS` blocks in each list, HunyuanDiT twice as many: its later half takes what
the earlier half put by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.models import Block, noise

NUM_BLOCKS = 4  # In every list.
BATCH = 2
SIDE = 4  # Image tokens per side.
TOKENS = SIDE**2
TEXT = 7  # Text tokens; differs from every number of image tokens.
FRAMES = 2  # Of a video.
AUDIO = 9  # Audio tokens.
NUM_CONTROLS = 2  # What a ControlNet adds between blocks.
PADDED = 32  # ZImage pads image and text to a multiple of this.

DUAL = ("encoder_hidden_states", "hidden_states")
SINGLE = ("hidden_states",)

_THOUSANDS = torch.full((BATCH,), 1000.0)  # Timesteps where a generation begins.
_INTEGERS = torch.full((BATCH,), 1000)
_FRACTIONS = torch.ones(BATCH)


@dataclass(frozen=True)
class Functorless:
    """One transformer, with all that a test needs to run it.

    Attributes:
        name: Key in `MODELS`.
        kind: The transformer's class.
        config: Its configuration.
        lists: Path of every block list, in execution order, with what its blocks return, in order; each is also the
            name of a parameter of theirs.
        inputs: seed -> arguments of a call besides the timestep, in new tensors.
        latents: Names of those that change from step to step.
        timestep: Name of the timestep.
        start: Its value where a generation begins; its type and shape are those of the argument.
    """

    name: str
    kind: type[nn.Module]
    config: dict[str, Any]
    lists: dict[str, tuple[str, ...]]
    inputs: Callable[[int], dict[str, Any]]
    latents: tuple[str, ...] = ("hidden_states",)
    timestep: str = "timestep"
    start: Tensor = _THOUSANDS

    def build(self) -> nn.Module:
        """A new transformer, always with the same weights; none of its blocks does nothing."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = self.kind(**self.config).eval().requires_grad_(False)
            for parameter in model.parameters():
                # Gates and output projections start at zero.
                if parameter.numel() > 1 and not parameter.any():
                    parameter.normal_(0, 0.02)
        return model

    def chain(self, model: nn.Module) -> list[Block]:
        """The blocks of `model` in execution order, with what they return."""
        return [(block, returns) for path, returns in self.lists.items() for block in model.get_submodule(path)]

    def arguments(self, seed: int = 1) -> dict[str, Any]:
        """Arguments of a call at the beginning of a generation."""
        return self.inputs(seed) | {self.timestep: self.start.clone(), "return_dict": False}

    def at(self, arguments: dict[str, Any], time: float) -> dict[str, Any]:
        """The step at `time`, 1 to 0: new latents and timestep; all else are the objects in `arguments`."""
        seed = round(1000 * time)
        latents = {
            name: pytree.tree_map(lambda value: noise(*value.shape, seed=seed), arguments[name])
            for name in self.latents
        }
        return arguments | latents | {self.timestep: (self.start * time).to(self.start.dtype)}


def _samples(seed: int, *shape: int, count: int = NUM_CONTROLS) -> list[Tensor]:
    return [noise(*shape, seed=seed + i) for i in range(count)]


def _flux_like(seed: int, channels: int = 4, text_width: int = 32) -> dict[str, Any]:
    """Packed image and text, with the places of their tokens."""
    return dict(
        hidden_states=noise(BATCH, TOKENS, channels, seed=seed),
        encoder_hidden_states=noise(BATCH, TEXT, text_width, seed=seed),
        img_ids=torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(SIDE))] * 2),
        txt_ids=torch.zeros(TEXT, 3),
    )


def _flux(seed: int) -> dict[str, Any]:
    return _flux_like(seed) | dict(pooled_projections=noise(BATCH, 32, seed=seed), guidance=torch.full((BATCH,), 3.5))


def _fibo(seed: int) -> dict[str, Any]:
    layers = _samples(seed, BATCH, TEXT, 32, count=2 * NUM_BLOCKS)
    return _flux_like(seed, channels=48, text_width=64) | dict(text_encoder_layers=layers)


def _dit(seed: int) -> dict[str, Any]:
    return dict(hidden_states=noise(BATCH, 4, 2 * SIDE, 2 * SIDE, seed=seed), class_labels=torch.tensor([1, 2]))


def _ltx2(seed: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(BATCH, FRAMES * TOKENS, 4, seed=seed),
        audio_hidden_states=noise(BATCH, AUDIO, 4, seed=seed),
        encoder_hidden_states=noise(BATCH, TEXT, 16, seed=seed),
        audio_encoder_hidden_states=noise(BATCH, TEXT, 16, seed=seed + 1),
        encoder_attention_mask=torch.ones(BATCH, TEXT, dtype=torch.bool),
        num_frames=FRAMES,
        height=SIDE,
        width=SIDE,
        audio_num_frames=AUDIO,
        fps=25.0,
    )


def _qwen_controlnet(seed: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(BATCH, TOKENS, 16, seed=seed),
        encoder_hidden_states=noise(BATCH, TEXT, 16, seed=seed),
        encoder_hidden_states_mask=None,  # What the pipeline makes of a mask of ones.
        img_shapes=[[(1, SIDE, SIDE)]] * BATCH,
        controlnet_block_samples=_samples(seed, BATCH, TOKENS, 64),
    )


def _wan_vace(seed: int) -> dict[str, Any]:
    video = (FRAMES, 2 * SIDE, 2 * SIDE)
    return dict(
        hidden_states=noise(BATCH, 16, *video, seed=seed),
        encoder_hidden_states=noise(BATCH, TEXT, 32, seed=seed),
        control_hidden_states=noise(BATCH, 48, *video, seed=seed),
    )


def _glm_image(seed: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(BATCH, 4, 2 * SIDE, 2 * SIDE, seed=seed),
        encoder_hidden_states=noise(BATCH, TEXT, 32, seed=seed),
        prior_token_id=torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS),
        prior_token_drop=torch.zeros(BATCH, TOKENS, dtype=torch.bool),
        target_size=torch.full((BATCH, 2), 2.0 * SIDE),
        crop_coords=torch.zeros(BATCH, 2),
    )


def _ernie_image(seed: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(BATCH, 4, SIDE, SIDE, seed=seed),
        text_bth=noise(BATCH, TEXT, 24, seed=seed),
        text_lens=torch.tensor([TEXT, TEXT - 2]),
    )


def _cosmos3(seed: int) -> dict[str, Any]:
    """One image after a text in one sequence; there is no batch."""
    image = torch.arange(TEXT, TEXT + TOKENS)
    return dict(
        input_ids=torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:TEXT],
        text_indexes=torch.arange(TEXT),
        position_ids=torch.arange(TEXT + TOKENS).repeat(3, 1),
        und_len=TEXT,
        sequence_length=TEXT + TOKENS,
        vision_tokens=[noise(1, 2, 1, SIDE, SIDE, seed=seed)],
        vision_token_shapes=[(1, SIDE, SIDE)],
        vision_sequence_indexes=image,
        vision_mse_loss_indexes=image,
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )


def _hunyuan_dit(seed: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(BATCH, 4, 2 * SIDE, 2 * SIDE, seed=seed),
        encoder_hidden_states=noise(BATCH, 4, 8, seed=seed),
        text_embedding_mask=torch.ones(BATCH, 4),
        encoder_hidden_states_t5=noise(BATCH, 4, 8, seed=seed + 1),
        text_embedding_mask_t5=torch.ones(BATCH, 4),
        image_meta_size=torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]] * BATCH),
        style=torch.zeros(BATCH, dtype=torch.int64),
        image_rotary_emb=(noise(TOKENS, 8, seed=seed), noise(TOKENS, 8, seed=seed + 1)),
    )


def _z_image_controlnet(seed: int) -> dict[str, Any]:
    samples = _samples(seed, BATCH, 2 * PADDED, 32)
    return dict(
        x=_samples(seed, 16, 1, 2 * SIDE, 2 * SIDE, count=BATCH),
        cap_feats=_samples(seed, TEXT, 16, count=BATCH),
        controlnet_block_samples=dict(zip((0, 2), samples, strict=True)),  # Added after these blocks.
    )


def _models() -> Iterator[Functorless]:
    flux = dict(
        patch_size=1,
        in_channels=4,
        num_layers=NUM_BLOCKS,
        num_single_layers=NUM_BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    yield Functorless(
        name="flux",
        kind=diffusers.FluxTransformer2DModel,
        config=flux | dict(pooled_projection_dim=32, guidance_embeds=True),
        lists={"transformer_blocks": DUAL, "single_transformer_blocks": DUAL},
        inputs=_flux,
        start=_FRACTIONS,
    )
    yield Functorless(
        name="chroma",
        kind=diffusers.ChromaTransformer2DModel,
        config=flux | dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        lists={"transformer_blocks": DUAL, "single_transformer_blocks": SINGLE},
        inputs=_flux_like,
        start=_FRACTIONS,
    )
    yield Functorless(
        name="dit",
        kind=diffusers.DiTTransformer2DModel,
        config=dict(
            in_channels=4,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=NUM_BLOCKS,
            num_embeds_ada_norm=8,
            patch_size=2,
            sample_size=2 * SIDE,
        ),
        lists={"transformer_blocks": SINGLE},
        inputs=_dit,
        start=_INTEGERS,
    )
    yield Functorless(
        name="ltx2",
        kind=diffusers.LTX2VideoTransformer3DModel,
        config=dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=NUM_BLOCKS,
            caption_channels=16,
            rope_double_precision=False,
        ),
        lists={"transformer_blocks": ("hidden_states", "audio_hidden_states")},
        inputs=_ltx2,
        latents=("hidden_states", "audio_hidden_states"),
    )
    yield Functorless(
        name="qwen-image-controlnet",
        kind=diffusers.QwenImageTransformer2DModel,
        config=dict(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=NUM_BLOCKS,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        lists={"transformer_blocks": DUAL},
        inputs=_qwen_controlnet,
        start=_FRACTIONS,
    )
    yield Functorless(
        name="wan-vace",
        kind=diffusers.WanVACETransformer3DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            ffn_dim=32,
            num_layers=NUM_BLOCKS,
            rope_max_seq_len=32,
            vace_layers=[0, 2],
            vace_in_channels=48,
        ),
        lists={"blocks": SINGLE},
        inputs=_wan_vace,
        start=_INTEGERS,
    )
    yield Functorless(
        name="glm-image",
        kind=diffusers.GlmImageTransformer2DModel,
        config=dict(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=NUM_BLOCKS,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=64,
        ),
        lists={"transformer_blocks": ("hidden_states", "encoder_hidden_states")},
        inputs=_glm_image,
        start=_INTEGERS,
    )
    yield Functorless(
        name="ernie-image",
        kind=diffusers.ErnieImageTransformer2DModel,
        config=dict(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=NUM_BLOCKS,
            ffn_hidden_size=48,
            in_channels=4,
            out_channels=4,
            text_in_dim=24,
            rope_axes_dim=(8, 4, 4),
        ),
        lists={"layers": ("x",)},
        inputs=_ernie_image,
    )
    yield Functorless(
        name="cosmos3-omni",
        kind=diffusers.Cosmos3OmniTransformer,
        config=dict(
            head_dim=6,
            hidden_act="relu2",
            hidden_size=12,
            intermediate_size=24,
            latent_channel=2,
            latent_patch_size=1,
            num_attention_heads=2,
            num_hidden_layers=NUM_BLOCKS,
            num_key_value_heads=1,
            patch_latent_dim=2,
            qk_norm_for_text=False,
            rms_norm_eps=1e-5,
            rope_axes_dim=[1, 1, 1],
            vocab_size=32,
        ),
        lists={"layers": ("und_seq", "gen_seq")},
        inputs=_cosmos3,
        latents=("vision_tokens",),
        timestep="vision_timesteps",
        start=torch.full((TOKENS,), 1000.0),  # One for each noisy token.
    )
    yield Functorless(
        name="hunyuan-dit",
        kind=diffusers.HunyuanDiT2DModel,
        config=dict(
            sample_size=2 * SIDE,
            patch_size=2,
            in_channels=4,
            num_layers=2 * NUM_BLOCKS,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            hidden_size=16,
            text_len=4,
            text_len_t5=4,
            activation_fn="gelu-approximate",
        ),
        lists={"blocks": SINGLE},
        inputs=_hunyuan_dit,
    )
    yield Functorless(
        name="bria-fibo",
        kind=diffusers.BriaFiboTransformer2DModel,
        config=flux
        | dict(in_channels=48, attention_head_dim=8, joint_attention_dim=64, text_encoder_dim=32)
        | dict(axes_dims_rope=(0, 4, 4)),
        lists={"transformer_blocks": DUAL, "single_transformer_blocks": SINGLE},
        inputs=_fibo,
    )
    yield Functorless(
        name="z-image-controlnet",
        kind=diffusers.ZImageTransformer2DModel,
        config=dict(
            in_channels=16,
            dim=32,
            n_layers=NUM_BLOCKS,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        lists={"layers": ("x",)},
        inputs=_z_image_controlnet,
        latents=("x",),
        timestep="t",
        start=_FRACTIONS,
    )


MODELS = {model.name: model for model in _models()}
