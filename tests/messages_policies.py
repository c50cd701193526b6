"""The rows of `messages_table` about policies, forecasters in a configuration, and fields that require each other."""

from __future__ import annotations

from typing import Any

from cachedit_fx import CacheConfig, ParamsModifier
from cachedit_fx.config.cache_config import check_together
from cachedit_fx.policies import Budget, History, StepView, decide
from tests.messages_table import Row, of_config


class Answers:
    """A policy that returns a number."""

    def decide(self, step: StepView) -> Any:
        return step.number + 1


def together(name: str, value: str, says: str, **fields: Any) -> Row:
    return Row(name, lambda _: check_together(CacheConfig(**fields)), value, says)


ROWS = [
    Row(
        "answer",
        lambda _: decide(CacheConfig(decider=Answers()), History(), 0.0, is_cached=True),
        "got 1 from Answers.decide",
        "decider must return True (compute), False (reuse) or None",
    ),
    of_config("decider", "decider must be a hashable object with a method decide(step)", decider=3),
    of_config("forecaster", "forecaster must be a Forecaster, its name or its mapping, or None", forecaster=3),
    of_config("coefficients", "rescale_coefficients must be a list of finite numbers", rescale_coefficients=(None,)),
    Row(
        "two-forecasters",
        lambda _: ParamsModifier(calibrator_config="taylorseer", forecaster="taylorseer"),
        "forecaster=TaylorSeerCalibratorConfig(",
        "calibrator_config and forecaster set the same field, got both",
    ),
    together(
        "guidance-host", "got 'cpu'", "cache_device must be None", guidance_reuse="difference", cache_device="cpu"
    ),
    together("percent", "got 0.5", "start_percent must be below end_percent", start_percent=0.5, end_percent=0.5),
    together("no-probe", "got None and 'dynamic'", "probe='none' measures nothing", probe="none"),
    together("no-ratios", "magnitude_ratios=()", "need each other", probe="timestep"),
    together(
        "probe-of-pruning",
        "got 'none'",
        "probe must be 'fn_residual' with cache_type='DBPrune'",
        cache_type="DBPrune",
        probe="none",
    ),
    of_config("rule", "Did you mean 'budget'?", policy="bugdet"),
    Row(
        "policy-and-field",
        lambda _: CacheConfig(policy=Budget(0.3), residual_diff_threshold=0.2),
        "policy=Budget(budget=0.3, coefficients=()) sets residual_diff_threshold=0.3",
        "got residual_diff_threshold=0.2 as well; give only one of the two",
    ),
    Row("setting", lambda _: Budget(bugdet=0.3), "(given 0.3)", "of Budget is unknown. Did you mean 'budget'?"),
    together(
        "one-call",
        "got False",
        "enable_separate_cfg must be True or None",
        guidance_reuse="difference",
        enable_separate_cfg=False,
    ),
    together(
        "unmeasured",
        "got 0.1 with steps_computation_policy='static'",
        "guidance_reuse_threshold must be None where nothing is measured",
        guidance_reuse="difference",
        guidance_reuse_threshold=0.1,
        probe="none",
        steps_computation_mask=(1, 0),
        steps_computation_policy="static",
    ),
    together("polynomial", "got (1.0,)", "unless decision_rule='budget'", rescale_coefficients=(1.0,)),
    together("output", "got 1 and 'DBCache'", "reach='output' skips everything", reach="output", Bn_compute_blocks=1),
]
