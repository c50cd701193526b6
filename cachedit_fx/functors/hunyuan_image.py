"""HunyuanImage: the tokens of two text encoders are joined without leaving the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cachedit_fx.functors.functor import PatchFunctor


class HunyuanImagePatchFunctor(PatchFunctor):
    """Makes HunyuanImage's transformer one graph.

    Dynamo stops where the tokens of two text encoders are joined, valid ones first: boolean masks pick them, sample by
    sample, so the sizes in between are data. A stable sort by the masks gives the same order. The join stands in the
    midst of the model's forward, between the call of the first text embedder and the attention mask. Both can be had
    without writing that forward anew: it is given the mask already joined and no second text, and the embedder, which
    gets both texts in one, returns them joined.
    """

    def prepare(self, transformer: nn.Module) -> None:
        embedder = transformer.get_submodule("context_embedder")
        self.replace_method(transformer, "forward", _pack_texts_for(_present_forward(transformer)))
        self.replace_method(embedder, "forward", _join_texts_after(_present_forward(embedder)))


class _Texts(NamedTuple):
    """What `encoder_hidden_states` carries from the model's forward to its text embedder.

    Attributes:
        first: Embeddings from the first encoder, [B, L, D].
        mask: Which of them are tokens, bool [B, L].
        second: Embeddings from the second encoder, [B, L2, D2].
        embed_second: Projects them to the model's width.
        order: For each place of the joined text, its place in the second text followed by the first, int64 [B, L2 + L].
    """

    first: Tensor
    mask: Tensor
    second: Tensor
    embed_second: nn.Module
    order: Tensor


def _present_forward(module: nn.Module) -> Callable[..., Any]:
    """`module.forward` as it is now, as a function of the module and its arguments.

    The instance's, not the class's: offloading hooks put their own there. And where it is a method, not bound: in a
    deep copy, it would run the original's weights.
    """
    forward = module.forward
    unbound: Callable[..., Any] = getattr(forward, "__func__", lambda _, *args, **kwargs: forward(*args, **kwargs))
    return unbound


def _pack_texts_for(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The transformer's forward, around `forward`: takes text [B, L, D] and [B, L2, D2], masks [B, L] and [B, L2]."""

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
    """The text embedder's forward, around `forward`: returns [B, L, D], or [B, L2 + L, D] for `_Texts`."""

    def joining_texts(
        self: Any, hidden_states: Tensor | _Texts, timestep: Tensor, attention_mask: Tensor | None = None
    ) -> Any:
        if not isinstance(hidden_states, _Texts):
            return forward(self, hidden_states, timestep, attention_mask)
        first, mask, second, embed_second, order = hidden_states
        text = torch.cat([embed_second(second), forward(self, first, timestep, mask)], dim=1)
        return text.gather(1, order.unsqueeze(2).expand_as(text))

    return joining_texts
