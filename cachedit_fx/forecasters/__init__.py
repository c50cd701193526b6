"""Forecasters compute what a reused step adds: the last cached value, or a forecast from the last few."""

from cachedit_fx.forecasters.dmd import DMDCalibratorConfig
from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.foca import FoCaCalibratorConfig
from cachedit_fx.forecasters.forecaster import Forecaster, LinearForecaster, Times
from cachedit_fx.forecasters.forecaster_registry import (
    as_mapping,
    forecaster_from,
    forecasters,
    register_forecaster,
    unregister_forecaster,
)
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig

__all__ = [
    "DMDCalibratorConfig",
    "FittedCalibratorConfig",
    "FoCaCalibratorConfig",
    "Forecaster",
    "LinearForecaster",
    "PolynomialCalibratorConfig",
    "TaylorSeerCalibratorConfig",
    "Times",
    "as_mapping",
    "forecaster_from",
    "forecasters",
    "register_forecaster",
    "unregister_forecaster",
]
