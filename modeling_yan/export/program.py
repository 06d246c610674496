"""The whole generation of one canvas as a program of `torch.export`, which runs where this package is not installed.

Letters of the shape comments: B prompts, S prompt length, L canvas length.
"""

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..canvas_yan import CanvasPlan, encode_and_solve
from ..layers_yan import with_valid_first
from ..modeling_yan import YanForFlowGeneration

ANY_ROWS = 2  # of the example for any number of prompts: one row would be taken for a constant
SUFFIXES = {"graph": ".pt2", "native": ".pt2", "onnx": ".onnx"}  # of the files that a program is saved in, by format


class YanCanvasProgram(nn.Module):
    """Prompt ids and mask to the token ids of one canvas; noise, steps and forbidden tokens are fixed."""

    start_noise: torch.Tensor

    def __init__(self, model: YanForFlowGeneration, canvas_length: int, plan: CanvasPlan, seed: int) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        like = torch.zeros((), device=model.device)
        noise = model.start_noise((1, model.config.num_vertices(canvas_length)), like, seed)
        self.register_buffer("start_noise", noise, persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) for prompts and masks (B, S)."""
        attention_mask, input_ids = with_valid_first(attention_mask, input_ids)
        noise = self.start_noise, None, None, None
        return cast(torch.Tensor, encode_and_solve(self.model, input_ids, attention_mask, *noise, self.plan).tokens)


def export_generation(
    model: YanForFlowGeneration,
    batch_size: int | None = 1,
    prompt_length: int | None = 64,
    canvas_length: int | None = None,
    num_flow_steps: int | None = None,
    min_new_tokens: int = 0,
    seed: int | None = None,
) -> torch.export.ExportedProgram:
    """Encoder, solver and decoder of one canvas as one graph of torch's own operators, weights included.

    The program takes ids and mask, both int64 (B, S), and returns the token ids (B, L) that `generate` would give on
    its first canvas without sampling; cutting at the EOS is left to the caller. Shorter prompts are padded, on either
    side. A size that is None is left open: the program takes any number of prompts, or prompts of any length up to
    `max_prompt_length`. Save it with `torch.export.save`, or compile it with
    `torch._inductor.aoti_compile_and_package`. Its experts are computed for all tokens and its Mamba scans in log2 L
    rounds, because the sparse forms are no operators of torch; a canvas takes correspondingly longer than in
    `generate`. Adapters have to be merged before.

    Args:
        model: A `YanForFlowGeneration`.
        batch_size, prompt_length: B and S, at least 1, or None for any.
        canvas_length, num_flow_steps: L and the number of solver steps, at least 1; if None, those of the
            `generation_config`, or else of the config.
        min_new_tokens: Number of first tokens that may not be EOS, at least 0; if 0, that of the model's
            `generation_config`, whose other options the program has, too.
        seed: Seed of the start noise; that of the `generation_config` if None, or 0.

    Raises:
        ValueError: A size below 1, or beyond `max_position_embeddings`; an `expert_choice` of the `generation_config`
            that needs a draw or a rank, which a program has not.

    Example:

        >>> import torch
        >>> from modeling_yan import YanConfig, YanForFlowGeneration
        >>> from modeling_yan.export import export_generation
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
        >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> export_generation(model, prompt_length=3).module()(ids, torch.ones_like(ids)).shape
        torch.Size([1, 8])
    """
    if any(parameter.is_meta for parameter in model.parameters()):  # packed weights
        raise ValueError("a model with packed or int8 weights: must be the model that it was made from")
    config, options = model.config, model.generation_config
    if canvas_length is None:
        canvas_length = getattr(options, "canvas_length", None) or config.canvas_length
    if num_flow_steps is None:
        num_flow_steps = getattr(options, "num_flow_steps", None)
    num_flow_steps = config.num_flow_steps if num_flow_steps is None else num_flow_steps
    shapes = _open_shapes(batch_size, prompt_length, config.max_prompt_length)
    batch_size = ANY_ROWS if batch_size is None else batch_size
    prompt_length = config.max_prompt_length if prompt_length is None else prompt_length
    for name, value in (("batch_size", batch_size), ("num_flow_steps", num_flow_steps)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for name, value, limit in (
        ("prompt_length", prompt_length, "max_prompt_length"),
        ("canvas_length", canvas_length, "max_position_embeddings"),
    ):
        if not 0 < value <= getattr(config, limit):
            raise ValueError(f"{name}={value}: must be 1 to {limit}={getattr(config, limit)}")
    plan = model.first_plan(min_new_tokens, canvas_length=canvas_length, num_flow_steps=num_flow_steps)
    if plan.expert_choice in ("sample", "ranked"):
        found = f"generation_config.expert_choice={plan.expert_choice!r}"
        raise ValueError(f"{found}: must be 'argmax' or 'mixture' in a program, which draws nothing")
    seed = seed if seed is not None else getattr(options, "seed", None) or 0
    program = YanCanvasProgram(model, canvas_length, plan, seed).eval()
    ids = torch.full((batch_size, prompt_length), config.eos_token_id or 0, device=model.device)
    with torch.no_grad():
        return torch.export.export(program, (ids, torch.ones_like(ids)), dynamic_shapes=shapes, strict=False)


def _open_shapes(batch_size: int | None, prompt_length: int | None, longest: int) -> dict[str, dict[int, Any]]:
    """The dimensions of ids and mask that are left open, as `torch.export` takes them."""
    is_open = {0: batch_size is None, 1: prompt_length is None}
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("prompt", max=longest)}
    shape = {axis: dims[axis] for axis in dims if is_open[axis]}
    return {"input_ids": shape, "attention_mask": shape}


def check_program_path(path: str | os.PathLike[str], format: str = "graph") -> None:
    """Raise ValueError where a program in this format can't be saved under this name."""
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r}: must be one of {', '.join(SUFFIXES)}")
    if Path(path).suffix != SUFFIXES[format]:
        raise ValueError(f"output={str(path)!r}: must end in {SUFFIXES[format]}")


def save_program(program: torch.export.ExportedProgram, path: str | os.PathLike[str], format: str = "graph") -> None:
    """Write a program of `export_generation` to a file.

    "graph" runs with `torch.export.load(path).module()(ids, mask)`. "native" is machine code for this kind of
    processor, takes minutes to make and runs with `torch._inductor.aoti_load_package(path)(ids, mask)`. "onnx" needs
    the packages of the extra "onnx" to be made and runs without torch, with
    `onnxruntime.InferenceSession(path).run(None, {"input_ids": ids, "attention_mask": mask})`.

    Raises:
        ValueError: A format that is none of these, or a path that does not end in .pt2, or in .onnx for "onnx".
    """
    check_program_path(path, format)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if format == "native":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    elif format == "onnx":
        torch.onnx.export(program, f=path, external_data=False, verbose=False)
    else:
        torch.export.save(program, path)
