"""What a user can do about each cause of a mismatch. One sentence each."""

from __future__ import annotations

from collections.abc import Mapping

from cachedit_fx.patterns.cause import Cause

_TEMPLATE = "register a template that says what these blocks do (docs/patterns.md)"

CURES: Mapping[Cause, str] = {
    Cause.NO_CHAIN: (
        "if Dynamo broke the model up, TORCH_LOGS=graph_breaks says where; fullgraph=True makes it an error. If the "
        "blocks stand in no list, a functor can gather them (docs/functors.md)"
    ),
    Cause.RESTRICTED: "this template is for other blocks; correct its block_class or module_path if it is yours",
    Cause.STREAM_COUNT: f"see what each block takes and returns there; {_TEMPLATE}, or make them alike by a functor",
    Cause.STREAM_NAME: "tell which stream is which: BlockTemplate(streams={'hidden_states': <its name in the code>})",
    Cause.NO_CONTEXT: f"leave the context out of takes, if the blocks need none; or {_TEMPLATE}",
    Cause.EXTRA_CONTEXT: f"name what the blocks also read in takes; {_TEMPLATE}",
    Cause.NO_EMITTED: "leave out of returns what nothing uses after the list",
    Cause.EXTRA_EMITTED: f"name what the blocks also return in returns; {_TEMPLATE}",
    Cause.RETURN_ORDER: "give returns the order of the block's return statement",
    Cause.TOO_FEW_BLOCKS: "lower Fn_compute_blocks or Bn_compute_blocks; one block at least has to lie between them",
    Cause.UNPAIRED: "choose Fn_compute_blocks or Bn_compute_blocks so that the streams have one shape at both cuts",
    Cause.NO_PROBE: (
        "set probe='fn_residual' and Fn_compute_blocks=1 or more: the probe is then what the first block adds"
    ),
    Cause.REACH: "leave reach at 'blocks': what lies behind the blocks then runs at every step",
    Cause.IN_PLACE: "write x = x + y in the model's code in place of x += y or x[...] = y, or have a functor do so",
    Cause.STATE: "let the state (autocast, sdpa_kernel) be set around the whole loop or inside each block",
    Cause.DYNAMIC: (
        "choose another Fn_compute_blocks or Bn_compute_blocks: a size that depends on data is needed on both sides of "
        "a cut here"
    ),
    Cause.EMPTY: "nothing: there is nothing to compute, and other batches of the same model are cached",
    Cause.GRADIENTS: "call the model under torch.no_grad() or torch.inference_mode(); the cache is for inference",
    Cause.TRAINING: "call .eval() on the model; the cache is for inference",
}
