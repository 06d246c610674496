"""Other forms of a model for generation: programs without this package, int8 or packed weights, merged layers."""

from .merging import with_merged_projections
from .packing import with_packed_weights
from .program import YanCanvasProgram, export_generation
from .quantization import with_int8_weights

__all__ = [
    "YanCanvasProgram",
    "export_generation",
    "with_int8_weights",
    "with_merged_projections",
    "with_packed_weights",
]
