"""Exports a cached transformer as one graph that runs without Python: `export`. See docs/export.md."""

from cachedit_fx.exporting.export_model import export
from cachedit_fx.exporting.exported_model import ExportedModel, ExportedStep
from cachedit_fx.exporting.tensor_spec import TensorSpec

__all__ = ["ExportedModel", "ExportedStep", "TensorSpec", "export"]
