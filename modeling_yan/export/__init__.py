"""Generation as a program that runs without this package."""

from .program import YanCanvasProgram, export_generation

__all__ = ["YanCanvasProgram", "export_generation"]
