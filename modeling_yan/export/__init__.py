"""Other forms of a model for generation: a program that runs without this package, and int8 weights."""

from .program import YanCanvasProgram, export_generation
from .quantization import with_int8_weights

__all__ = ["YanCanvasProgram", "export_generation", "with_int8_weights"]
