"""What a user can do about each cause of a mismatch: one sentence for each, without a period."""

from __future__ import annotations

from collections.abc import Mapping

from cachedit_fx.patterns.cause import Cause

_TEMPLATE = "register a template that describes these blocks (docs/patterns.md)"

CURES: Mapping[Cause, str] = {
    Cause.NO_CHAIN: (
        "call the blocks in a loop over an nn.ModuleList, or gather them with a functor (docs/functors.md); if Dynamo "
        "broke the model up, TORCH_LOGS=graph_breaks shows where"
    ),
    Cause.NO_TRANSFORMER: "use a cache that is made for UNets",
    Cause.RESTRICTED: "correct block_class or module_path if the template is meant for these blocks",
    Cause.STREAM_COUNT: (
        "change the model there so that all blocks take and return the same streams, "
        f"{_TEMPLATE}, or use a functor (docs/functors.md)"
    ),
    Cause.STREAM_NAME: "name the streams: BlockTemplate(streams={'hidden_states': <its name in the code>})",
    Cause.NO_CONTEXT: f"remove the context from takes if the blocks need none, or {_TEMPLATE}",
    Cause.EXTRA_CONTEXT: f"add to takes what the blocks also read: {_TEMPLATE}",
    Cause.NO_EMITTED: "remove from returns what is not used after the list",
    Cause.EXTRA_EMITTED: f"add to returns what the blocks also return: {_TEMPLATE}",
    Cause.RETURN_ORDER: "give returns the order of the block's return statement",
    Cause.TOO_FEW_BLOCKS: "lower Fn_compute_blocks or Bn_compute_blocks; at least one block must lie between them",
    Cause.UNPAIRED: "choose Fn_compute_blocks or Bn_compute_blocks so that a stream has the same shape at both cuts",
    Cause.NO_PROBE: (
        "set probe='fn_residual' and Fn_compute_blocks to 1 or more; the probe is then the residual of the first block"
    ),
    Cause.REACH: "set reach='blocks'; everything after the blocks then runs at every step",
    Cause.IN_PLACE: "write x = x + y instead of x += y or x[...] = y in the model's code, or use a functor that does",
    Cause.STATE: "set the state (autocast, sdpa_kernel) around the whole loop or inside each block",
    Cause.DYNAMIC: (
        "choose another Fn_compute_blocks or Bn_compute_blocks: at the present cuts, a size that depends on data is "
        "needed on both sides"
    ),
    Cause.EMPTY: "nothing: there is nothing to compute, and other batches of the same model are cached",
    Cause.GRADIENTS: "call the model under torch.no_grad() or torch.inference_mode(); the cache is for inference",
    Cause.TRAINING: "call .eval() on the model; the cache is for inference",
}
