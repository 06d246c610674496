"""Other forms of a model for generation: a program that runs without this package, int8 weights, merged layers."""

from .merging import with_merged_projections
from .program import YanCanvasProgram, export_generation
from .quantization import with_int8_weights

__all__ = ["YanCanvasProgram", "export_generation", "with_int8_weights", "with_merged_projections"]
