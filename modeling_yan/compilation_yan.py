"""Operators that `torch.compile` takes as they are, without looking into them."""

import re
from collections.abc import Callable

import torch


def opaque_operator(function: Callable, fake: Callable) -> Callable:
    """`function` as one operator of the compiled graph; `fake` gives empty tensors shaped like its results.

    It must not return its own inputs. The operator is named after the module it is defined in: this code, loaded a
    second time from a checkpoint's folder, registers operators of its own.
    """
    name = re.sub(r"\W", "_", f"{function.__module__}_{function.__name__}")
    operator = torch.library.custom_op(f"yan::{name}", function, mutates_args=())
    operator.register_fake(fake)
    return operator
