"""Other forms of a model for generation: programs without this package, int8 or packed weights."""

from .packing import with_packed_weights
from .program import YanCanvasProgram, check_program_path, export_generation, save_program
from .quantization import with_int8_weights

__all__ = [
    "YanCanvasProgram",
    "check_program_path",
    "export_generation",
    "save_program",
    "with_int8_weights",
    "with_packed_weights",
]
