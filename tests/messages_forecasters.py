"""The rows of `messages_table` about forecasters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from cachedit_fx.forecasters import (
    DMDCalibratorConfig,
    FittedCalibratorConfig,
    Forecaster,
    TaylorSeerCalibratorConfig,
    as_mapping,
    forecaster_from,
    register_forecaster,
)
from cachedit_fx.forecasters.compile import CompiledForecaster
from tests.messages_table import Row


@dataclass(frozen=True, kw_only=True)
class Mine(Forecaster):
    """Does what a forecaster must not do: depends on a tensor's value, or returns something else than a tensor."""

    does: str = "ask"

    def predict(self, history: tuple[Tensor, ...], numbers: Tensor) -> Tensor:
        if self.does == "ask":
            return history[0] if numbers[0] > 1 else -history[0]
        return -history[0] if self.does == "fit" else history[0].sum()

    def update(self, history: tuple[Tensor, ...], value: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        return (value, value.double())


def refuse(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    raise NotImplementedError("aten.neg")


def predict(does: str) -> Callable[[Path], object]:
    return lambda _: CompiledForecaster(Mine(does=does), refuse).predict((torch.ones(2, 3),), (1.0,))


def needs_a_field(_: Path) -> None:
    from cachedit_fx.forecasters import unregister_forecaster

    @register_forecaster("weighted")
    @dataclass(frozen=True, kw_only=True)
    class Weighted(Forecaster):
        weight: float

    try:
        forecaster_from({"type": "weighted", "by": "step"})
    finally:
        unregister_forecaster("weighted")


ROWS = [
    Row("fitted-by", lambda _: FittedCalibratorConfig(by="timestep"), "got 'timestep'", "by must be 'step'"),
    Row("fitted-computed", lambda _: FittedCalibratorConfig(computed=3), "got 3", "computed must be a list"),
    Row("fitted-factors", lambda _: FittedCalibratorConfig(factors=[1.0]), "got [1.0]", "at most memory=3"),
    Row(
        "forecaster-field",
        lambda _: TaylorSeerCalibratorConfig(taylor_order=2),
        "'taylor_order'",
        "of forecaster TaylorSeerCalibratorConfig is unknown. Did you mean 'taylorseer_order'?\nAllowed: by, ",
    ),
    Row("forecaster-choice", lambda _: Forecaster(by="time"), "got 'time'", "by must be one of 'step', 'timestep'"),
    Row(
        "forecaster-switch",
        lambda _: Forecaster(enable_calibrator=None),
        "got None",
        "enable_calibrator must be True or False",
    ),
    Row(
        "forecaster-int",
        lambda _: DMDCalibratorConfig(dmd_history=3),
        "got 3",
        "dmd_history must be an int >= 4",
    ),
    Row(
        "forecaster-number",
        lambda _: DMDCalibratorConfig(dmd_ridge=float("inf")),
        "got inf",
        "dmd_ridge must be a finite number >= 0",
    ),
    Row(
        "forecaster-of-hidden-states",
        lambda _: TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states"),
        "got 'hidden_states'",
        "calibrator_cache_type must be 'residual' (a reused step adds",
    ),
    Row(
        "forecaster-name-taken",
        lambda _: register_forecaster("dmd"),
        "got 'dmd'",
        "register_forecaster takes a name other than 'last', 'taylorseer'",
    ),
    Row(
        "forecaster-class",
        lambda _: register_forecaster("mine")(dict),  # type: ignore[type-var]
        "got <class 'dict'>",
        "must be a class derived from Forecaster and decorated with @dataclass(frozen=True",
    ),
    Row(
        "forecaster-kind", lambda _: forecaster_from(3), "got 3", "a mapping with a name under 'type', such as {'type'"
    ),  # type: ignore[arg-type]
    Row(
        "forecaster-type",
        lambda _: forecaster_from({"type": "taylor"}),
        "got 'taylor'",
        "forecaster's type must be one of 'last', 'taylorseer', 'foca', 'dmd', 'polynomial'",
    ),
    Row(
        "forecaster-missing-field",
        needs_a_field,
        "'by': 'step'",
        "needs a value for weight, which has no default; add it",
    ),
    Row("forecaster-without-name", lambda _: as_mapping(Mine()), "got a Mine", "must have a name"),
    Row("forecaster-asks", predict("ask"), "DataDependentOutputException", "Mine cannot be traced (at messages_fo"),
    Row("forecaster-refused", predict("fit"), "NotImplementedError: aten.neg", "does not compile `predict` of fore"),
    Row(
        "forecaster-predict",
        predict("sum"),
        "found:    a float32 tensor of shape ()",
        "Mine returned a value that does not fit the history.\n  expected: a float32 tensor of shape (2, 3)",
    ),
    Row(
        "forecaster-update",
        lambda _: CompiledForecaster(Mine(), refuse).update((), torch.ones(2), ()),
        "found:    (a float32 tensor of shape (2,), a float64 tensor of shape (2,))",
        "expected: a tuple of 1 to 1 (`depth`), each a float32 tensor of shape (2,)",
    ),
]
