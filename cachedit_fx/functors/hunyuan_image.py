"""The patch functor for HunyuanImage, which joins the tokens of two text encoders without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cachedit_fx.functors.functor import PatchFunctor


class HunyuanImagePatchFunctor(PatchFunctor):
    """Lets Dynamo capture the transformer of HunyuanImage as one graph.

    Dynamo breaks the graph where the tokens of two text encoders are joined, valid ones first. Boolean masks select
    them for each sample, so the sizes depend on data. A stable sort by the masks gives the same order. The join is in
    the middle of the forward of the model, between the call of the first text embedder and the attention mask. This
    functor changes it without a new copy of the forward: the forward receives the joined mask and no second text, and
    the embedder receives both texts in one argument and returns them joined.
    """

    def prepare(self, transformer: nn.Module) -> None:
        embedder = transformer.get_submodule("context_embedder")
        self.replace_method(transformer, "forward", _pack_texts_for(_present_forward(transformer)))
        self.replace_method(embedder, "forward", _join_texts_after(_present_forward(embedder)))


class _Texts(NamedTuple):
    """Both texts, which are passed as `encoder_hidden_states` from the model's forward to its text embedder.

    Attributes:
        first: Embeddings from the first encoder, [B, L, D].
        mask: Whether each of them is a token, bool [B, L].
        second: Embeddings from the second encoder, [B, L2, D2].
        embed_second: Projects `second` to the width of the model.
        order: For each position in the joined text, its position in the second text followed by the first, int64
            [B, L2 + L].
    """

    first: Tensor
    mask: Tensor
    second: Tensor
    embed_second: nn.Module
    order: Tensor


def _present_forward(module: nn.Module) -> Callable[..., Any]:
    """Returns the current `module.forward` as a function of the module and its arguments.

    This is the forward of the instance, because offloading hooks replace it there. A method is unbound, because a bound
    one would run the weights of the original in a deep copy.
    """
    forward = module.forward
    unbound: Callable[..., Any] = getattr(forward, "__func__", lambda _, *args, **kwargs: forward(*args, **kwargs))
    return unbound


def _pack_texts_for(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a forward of the transformer that calls `forward` with both texts packed into one argument.

    It takes texts [B, L, D] and [B, L2, D2] with masks [B, L] and [B, L2].
    """

    def packing_texts(
        self: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Any,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.context_embedder_2 is not None and encoder_hidden_states_2 is not None:
            mask, mask_2 = encoder_attention_mask.bool(), encoder_attention_mask_2.bool()
            joined = torch.cat([mask_2, mask], dim=1)
            order = joined.int().argsort(dim=1, descending=True, stable=True)
            encoder_hidden_states = _Texts(
                encoder_hidden_states, mask, encoder_hidden_states_2, self.context_embedder_2, order
            )
            encoder_attention_mask = joined.gather(1, order)
        text = (encoder_hidden_states, encoder_attention_mask)
        return forward(self, hidden_states, timestep, *text, timestep_r, None, None, *args, **kwargs)

    return packing_texts


def _join_texts_after(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a forward of the text embedder that calls `forward` and joins both texts.

    It returns [B, L, D] for a single text, and [B, L2 + L, D] for `_Texts`.
    """

    def joining_texts(
        self: Any, hidden_states: Tensor | _Texts, timestep: Tensor, attention_mask: Tensor | None = None
    ) -> Any:
        if not isinstance(hidden_states, _Texts):
            return forward(self, hidden_states, timestep, attention_mask)
        first, mask, second, embed_second, order = hidden_states
        text = torch.cat([embed_second(second), forward(self, first, timestep, mask)], dim=1)
        return text.gather(1, order.unsqueeze(2).expand_as(text))

    return joining_texts
