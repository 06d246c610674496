"""Operators that `torch.compile` takes as they are, without looking into them."""

import re
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._library.custom_ops import CustomOpDef


def is_exporting() -> bool:
    """Whether `torch.export` is tracing: its programs run where this package and its operators do not exist.

    The flag itself, because before torch 2.13 `torch.compiler.is_exporting` is true for `torch.compile`, too.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def use_custom_ops() -> bool:
    """Whether the code is traced for a compiler that may call this package's operators."""
    return torch.compiler.is_compiling() and not is_exporting()


def merge_repeated(graph: torch.fx.Graph) -> None:
    """Compute once what a functional graph computes several times.

    The steps of a solver are one program, and each of them would join the same weights once more. The compiler merges
    repetitions where it prepares a backward pass, and otherwise not.
    """
    first: dict[tuple[Any, str, str], torch.fx.Node] = {}
    for node in list(graph.nodes):
        operator = node.target
        if node.op != "call_function" or not isinstance(operator, torch._ops.OpOverload):
            continue
        if operator._schema.is_mutable or torch.Tag.nondeterministic_seeded in operator.tags:
            continue
        known = first.setdefault((operator, repr(node.args), repr(node.kwargs)), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


@cache
def _merging_pass() -> "CustomGraphPass":
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Merging(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            merge_repeated(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return Merging()


def merging() -> AbstractContextManager[Any]:
    """Within it inductor merges what is repeated in a program that it compiles, unless it has a pass of the user's."""
    from torch._inductor import config  # slow to import

    return config.patch(post_grad_custom_pre_pass=config.post_grad_custom_pre_pass or _merging_pass())


def is_bare(module: nn.Module, *types: type) -> bool:
    """Whether it is of one of these types, and reading its weights does what calling it would do.

    It does not if the module has an adapter, a quantized weight, or a hook, which may fetch the weight from a disk.
    """
    is_patched = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    return type(module) in types and not is_patched and type(module.weight) is nn.Parameter


def _operator_name(name: str) -> str:
    """A name that torch takes for an operator: it has to be ASCII, and a user's folder, part of it, need not be."""
    return re.sub(r"\W", lambda other: f"_{ord(other[0]):x}_", name.replace(".", "_"), flags=re.ASCII)


def _with_typing_names(hint: Any) -> Any:
    """`list[int]` as `typing.List[int]`, the only name of it that torch 2.6 knows, and the same inside a tuple."""
    old = {list: "List", tuple: "Tuple"}.get(typing.get_origin(hint))
    return getattr(typing, old)[tuple(map(_with_typing_names, typing.get_args(hint)))] if old else hint


def opaque_operator(function: Callable[..., Any], fake: Callable[..., Any]) -> "CustomOpDef":
    """`function` as one operator of the compiled graph; `fake` gives empty tensors shaped like its results.

    It must not return its own inputs, and `fake` must read sizes from `shape`: `len` would make them constants. The
    operator is named after the module it is defined in: this code, loaded a second time from a checkpoint's folder,
    registers operators of its own.
    """
    name = _operator_name(f"{function.__module__}_{function.__name__}")
    function.__annotations__ = {key: _with_typing_names(hint) for key, hint in function.__annotations__.items()}
    operator = torch.library.custom_op(f"yan::{name}", function, mutates_args=())
    operator.register_fake(fake)
    return operator


def _select_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table[index]


def _add_rows(rows: torch.Tensor, index: torch.Tensor, table_size: int) -> torch.Tensor:
    return rows.new_zeros(table_size, rows.shape[-1]).index_add_(0, index.flatten(), rows.flatten(0, -2))


_select_operator = opaque_operator(_select_rows, lambda table, index: table.new_empty(*index.shape, table.shape[-1]))
_add_operator = opaque_operator(_add_rows, lambda rows, index, table_size: rows.new_empty(table_size, rows.shape[-1]))


def _save_index(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    table, index = inputs
    ctx.table_size = table.shape[0]
    ctx.save_for_backward(index)


_select_operator.register_autograd(
    lambda ctx, grad: (_add_operator(grad.contiguous(), *ctx.saved_tensors, ctx.table_size), None),
    setup_context=_save_index,
)


def select_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows (..., D) of a table (N, D) that `index` (...) names.

    Opaque, because the code that inductor of torch 2.13 generates for the CPU may use a gradient that sums rows before
    it is summed.
    """
    return _select_operator(table, index) if use_custom_ops() else F.embedding(index, table)
