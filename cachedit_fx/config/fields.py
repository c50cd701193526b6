"""What can be set: the fields of a configuration, each declared once. `CacheConfig` is a configuration of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cachedit_fx.config.options import option, options_of
from cachedit_fx.config.rules import Budget, Magnitude, flat_spelling
from cachedit_fx.config.values import Decides, as_forecaster, compile_modes, inner_backends, is_decider
from cachedit_fx.forecasters.foca import FoCaCalibratorConfig
from cachedit_fx.forecasters.forecaster import Forecaster


class CacheType(StrEnum):
    """What is decided about: the middle blocks as one, or every block on its own."""

    DBCache = "DBCache"
    DBPrune = "DBPrune"


@dataclass(frozen=True, eq=False)
class Fields:
    """The declarations, with the defaults of this package."""

    # Chosen on two trained models (docs/quality.md). The first steps decide what an image shows: with 4 warm-up steps
    # and a threshold of 0.12, the clips are 13 dB below the best at equal cost. FoCa wins at nearly every threshold.
    Fn_compute_blocks: int = option(
        1,
        minimum=0,
        structural=True,
        group="When a step is reused",
        doc="Blocks at the front of the chain that always run. The residual over them is the probe, unless `probe` "
        "says otherwise. 0 caches the whole chain, and needs another `probe` or a mask with "
        '`steps_computation_policy="static"`.',
    )
    Bn_compute_blocks: int = option(
        0,
        minimum=0,
        structural=True,
        doc="Blocks at the end of the chain that always run, which corrects the error of a reused step.",
    )
    residual_diff_threshold: float = option(
        0.2,
        doc="A step is reused only if the residual diff, the relative L1 change of the probe since the last computed "
        "step, is strictly below this. At 0 or less no step is reused; at 1 or more the residual diff is not measured.",
    )
    max_warmup_steps: int | None = option(
        None,
        minimum=0,
        doc="Steps at the beginning of a session that are computed. With a mask, no more than the 1s that it begins "
        "with. None: the steps until the timestep of the pipeline's scheduler has changed by a sixth of its range, at "
        "most 8; outside of a pipeline, 8.",
    )
    warmup_interval: int = option(
        1,
        minimum=1,
        doc="Of the warm-up steps, only every `warmup_interval`-th must be computed, beginning with the first.",
    )
    max_cached_steps: int = option(-1, minimum=-1, doc="The most steps that a session reuses. -1: no limit.")
    max_continuous_cached_steps: int = option(-1, minimum=-1, doc="The most steps reused in a row. -1: no limit.")
    max_accumulated_residual_diff_threshold: float | None = option(
        None,
        doc="A step is computed once the residual diffs of the steps reused since the last computed step add up to "
        "this. None or 0: no limit.",
    )
    start_percent: float = option(
        0.0,
        minimum=0,
        maximum=1,
        doc="The steps of this first part of a generation are computed, from 0 to 1. The length of a generation is "
        "that of the pipeline's scheduler, or else `num_inference_steps`; if neither is known, no step is reused.",
    )
    end_percent: float = option(
        1.0,
        minimum=0,
        maximum=1,
        doc="The steps after this part of a generation are computed, from 0 to 1.",
    )
    final_compute_steps: int = option(
        0, minimum=0, doc="Steps at the end of a generation that are computed. Its length is known as above."
    )
    num_inference_steps: int | None = option(
        None,
        minimum=1,
        doc="Steps of a generation; the step after them begins a new one. None: a generation ends where the timestep, "
        "the conditioning or the end of the pipeline's call says so.",
    )
    steps_computation_mask: Sequence[int] | None = option(
        None,
        choices=(0, 1),
        not_empty=True,
        group="Masks and refreshing",
        doc="For every step 1 (compute it) or 0 (it may be reused). Steps beyond the end of the mask may be reused. "
        "See `steps_mask`.",
    )
    steps_computation_policy: str = option(
        "dynamic",
        choices=("dynamic", "static"),
        doc='What a 0 in the mask means: "dynamic" lets the other options decide, "static" reuses the step without '
        "measuring anything.",
    )
    force_refresh_step_hint: int | None = option(
        None, minimum=1, doc="Before this step of a session, everything cached is dropped and warm-up begins again."
    )
    force_refresh_step_policy: str = option(
        "once",
        choices=("once", "repeat"),
        doc='"once" refreshes once in a session, "repeat" after every `force_refresh_step_hint` steps.',
    )
    enable_separate_cfg: bool | None = option(
        None,
        group="Classifier-free guidance",
        doc="Whether guidance calls the model once per guidance branch. The branches are told apart in any case; False "
        "means that no other branch can share its residual diff.",
    )
    cfg_compute_first: bool = option(
        False, doc="Whether the unconditional guidance branch is called first at every step."
    )
    cfg_diff_compute_separate: bool = option(
        True,
        doc="False: the guidance branch that is called second takes the residual diff that the first measured at the "
        "same step, if it measured one, in place of its own.",
    )
    cache_type: str = option(
        CacheType.DBCache,
        choices=tuple(map(str, CacheType)),
        structural=True,
        group="Pruning",
        doc='"DBCache" decides about the middle blocks together. "DBPrune" decides about each of them, by how far its '
        "input has changed since the block was last computed.",
    )
    enable_dynamic_prune_threshold: bool = option(
        False, doc="With DBPrune: the threshold follows the mean of the first residual diffs of the step."
    )
    max_dynamic_prune_threshold: float | None = option(
        None, doc="With DBPrune: what such a threshold stays below. None: twice `residual_diff_threshold`."
    )
    dynamic_prune_threshold_relax_ratio: float = option(1.25, doc="With DBPrune: what that mean is multiplied by.")
    non_prune_block_ids: Sequence[int] = option(
        (),
        minimum=0,
        structural=True,
        doc="With DBPrune: blocks that always run besides the Fn and Bn ones, by their number in the chain (in their "
        "block list, if each list has a region of its own).",
    )
    inner_backend: str = option(
        "inductor",
        choices=inner_backends,
        allowed="a backend of torch.compile other than 'cachedit', such as 'inductor', 'aot_eager' or 'eager'",
        see="torch.compiler.list_backends(exclude_tags=())",
        structural=True,
        whole_model=True,
        group="Matching and compilation",
        doc="The `torch.compile` backend that compiles the pieces.",
    )
    on_no_match: str = option(
        "fallback",
        choices=("fallback", "raise"),
        structural=True,
        whole_model=True,
        doc='What to do with a graph that cannot be cached: "fallback" compiles it as it is and warns once, "raise" '
        "raises `NoMatchError`.",
    )
    regions: str = option(
        "merged",
        choices=("merged", "per_list"),
        structural=True,
        whole_model=True,
        doc='"merged" decides once for the whole chain, "per_list" for every block list.',
    )
    compile_blocks: str = option(
        "once",
        choices=("once", "inline"),
        structural=True,
        whole_model=True,
        doc='"once" compiles blocks of equal structure a single time, "inline" compiles the head, each region and the '
        "tail as one graph each.",
    )
    mode: str | None = option(
        None,
        choices=compile_modes,
        allowed="a mode of torch.compile, such as 'default', 'reduce-overhead' or 'max-autotune'",
        see="torch._inductor.list_mode_options()",
        structural=True,
        whole_model=True,
        doc="The mode of the inner backend. `torch.compile` itself takes either `mode=` or `options=`.",
    )
    forecaster: Forecaster | None = option(
        FoCaCalibratorConfig(),
        convert=as_forecaster,
        accepts=lambda value: isinstance(value, Forecaster),
        allowed="a Forecaster, its name or its mapping",
        group="Reusing and deciding",
        doc="What a reused step adds to the streams: a forecast from the last few residuals, which costs the memory of "
        "those residuals. None adds the last residual.",
    )
    reach: str = option(
        "blocks",
        choices=("blocks", "output"),
        structural=True,
        whole_model=True,
        doc='What a reused step leaves out: "blocks" the middle blocks of the chain, "output" everything between the '
        "Fn blocks and what the model returns.",
    )
    probe: str = option(
        "fn_residual",
        choices=("fn_residual", "modulated_input", "timestep", "none"),
        structural=True,
        whole_model=True,
        doc='The tensor whose change decides: "fn_residual" what the Fn blocks add, "modulated_input" the '
        'time-modulated norm of the first block, for which no block needs to run. "timestep" measures nothing and '
        'goes with `Magnitude`; "none" measures nothing and goes with a static mask or a `decider`.',
    )
    batch_decision: str = option(
        "mean",
        choices=("mean", "any"),
        structural=True,
        whole_model=True,
        doc='"mean" takes the residual diff over the whole batch, "any" computes if that of any sample is too large.',
    )
    decision_rule: str = option(
        "threshold",
        choices=("threshold", "budget"),
        doc='The rule that decides: "threshold" for `Threshold`, "budget" for `Budget` and, with '
        '`probe="timestep"`, for `Magnitude`.',
    )
    rescale_coefficients: Sequence[float] = flat_spelling(Budget, "coefficients")
    magnitude_ratios: Sequence[float] = flat_spelling(Magnitude, "ratios")
    decider: Decides | None = option(
        None,
        accepts=is_decider,
        allowed="a hashable object with a method decide(step)",
        doc="An object of your own that decides in place of the rule: its `decide(step: StepView)` returns True "
        "(compute), False (reuse) or None (let the rule decide).",
    )
    guidance_reuse: str = option(
        "off",
        choices=("off", "difference"),
        group="Guidance reuse",
        doc='"difference": at a step where the guidance branch that is called first computes, the others do not run '
        "the blocks of the region. Their residual is that of the first branch plus their last difference from it (with "
        "a forecaster, the forecast of this difference). Where the first branch reuses, the others do, too, by its "
        "residual diff.",
    )
    max_continuous_guidance_steps: int = option(
        -1,
        minimum=-1,
        doc="The most such steps of a guidance branch in a row; at the next step that the first branch computes, it "
        "computes as well. -1: no limit.",
    )
    guidance_computation_mask: Sequence[int] | None = option(
        None,
        choices=(0, 1),
        not_empty=True,
        doc="For every step 1 (if the first guidance branch computes it, the others do, too) or 0 (they may use the "
        "difference). Steps beyond the end of the mask may use it. Warm-up steps are computed, but with a mask no more "
        "of them than the 1s that it begins with.",
    )
    guidance_reuse_threshold: float | None = option(
        None,
        above=0,
        doc="A guidance branch uses the difference only at a step whose own residual diff is strictly below this. "
        "None: at every step, whatever its residual diff is.",
    )
    fast_dispatch: bool = option(
        True,
        whole_model=True,
        group="Running and debugging",
        doc="After one call through Dynamo, `enable_cache` serves the calls of a module itself where the result is the "
        "same, and a reused step checks only the guards of what it runs. False: Dynamo serves every call.",
    )
    shadow: bool = option(
        False,
        structural=True,
        whole_model=True,
        doc="Every step is computed, and the statistics say which would have been reused and how large the error would "
        "have been (`CacheStats.errors`). A step costs up to two, and one more host read.",
    )
    debug_dir: str | os.PathLike[str] | None = option(
        None,
        convert=lambda _, path: os.fspath(path) if isinstance(path, os.PathLike) else path,
        accepts=lambda value: isinstance(value, str) and bool(value),
        allowed="the path of a folder",
        structural=True,
        whole_model=True,
        doc="A folder for the graph before and after every pass, the match report as JSON and a script that repeats "
        "the passes; one subfolder per graph.",
    )
    cache_device: str | None = option(
        None,
        choices=("cpu",),
        doc='Where the cached residuals are between two steps: "cpu" in pinned host memory, which a computed step '
        "copies them to and a reused step back from. The probe stays on the device. None: on the device that made "
        "them.",
    )
    max_state_bytes: int | None = option(
        4 * 2**30,
        minimum=0,
        whole_model=True,
        doc="The most bytes that all sessions of a transformer may cache together. Beyond it the generation used least "
        "recently is dropped, and computes again if it continues; the running one never is. None: no limit.",
    )

    @property
    def is_static(self) -> bool:
        """Whether a mask alone decides, so that nothing has to be measured."""
        return self.steps_computation_mask is not None and self.steps_computation_policy == "static"


OPTIONS = options_of(Fields)
FIELD_NAMES: tuple[str, ...] = tuple(OPTIONS)
OPTION_NAMES = (*FIELD_NAMES, "policy")  # What a configuration may be given.
