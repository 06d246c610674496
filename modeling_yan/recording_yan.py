"""Generation recorded as CUDA graphs: once recorded, a call costs the host little more than one launch."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import is_

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)
MAX_RECORDINGS = 32  # of a model; then the one that has not been asked for the longest time is given up
NUM_WARM_UPS = 2  # the first call compiles, and libraries prepare themselves in the first calls


class ModelParts:
    """The modules, weights and hooks that a model has, and whether they are still the same.

    A recording reads the weights where they were. It follows whatever changes them in place, as an optimizer does, but
    knows nothing of an adapter, of a hook, or of weights that were replaced or moved.
    """

    def __init__(self, model: nn.Module):
        tables = [table for module in model.modules() for table in self._tables_of(module)]
        self.tables, self.empty_tables = [table for table in tables if table], [table for table in tables if not table]
        self.members = self._current_members()
        self.tensors = [member for member in self.members if torch.is_tensor(member)]
        self.addresses = self._current_addresses()

    @staticmethod
    def _tables_of(module):
        hooks = module._forward_hooks, module._forward_pre_hooks
        return module._modules, module._parameters, module._buffers, *hooks

    def _current_members(self):
        return list(chain.from_iterable(map(dict.values, self.tables)))

    def _current_addresses(self):
        return [tensor.data_ptr() for tensor in self.tensors]

    def are_the_same(self) -> bool:
        """In a tenth of a millisecond at most."""
        members = self._current_members()
        is_same = len(members) == len(self.members) and all(map(is_, members, self.members))
        return is_same and not any(self.empty_tables) and self._current_addresses() == self.addresses


class Recording:
    """A function of tensors as a CUDA graph, which is replayed on copies of its arguments.

    Args:
        function: Takes the tensors and returns a dict of tensors and other values; must not wait for the device.
        tensors: Arguments, None among them, whose shapes and types those of all calls have.
        pool: Memory that it shares with recordings that are never replayed at the same time.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, function: Callable, tensors: Sequence[torch.Tensor | None], pool):
        self.arguments = [None if tensor is None else tensor.clone() for tensor in tensors]
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                function(*self.arguments)
            # cuBLAS keeps the memory that it works in for each stream: the graph needs memory of its own pool, because
            # whatever else records graphs in this process lets go of the rest.
            torch._C._cuda_clearCublasWorkspaces()
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.results = function(*self.arguments)
            finally:
                self.graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(stream)

    def __call__(self, *tensors: torch.Tensor | None) -> dict:
        for argument, tensor in zip(self.arguments, tensors, strict=True):
            if argument is not None:
                argument.copy_(tensor)
        self.graph.replay()
        return {name: result.clone() if torch.is_tensor(result) else result for name, result in self.results.items()}


class Recordings:
    """The recordings of one model. They are no part of it: a copy, also a pickled one, begins without any."""

    def __init__(self):
        self.parts, self.calls, self.pool = None, OrderedDict(), None
        self.lock, self.is_done = threading.Lock(), None  # all calls share memory

    def __deepcopy__(self, memo):
        return Recordings()

    def __reduce__(self):
        return Recordings, ()

    def call(self, model: nn.Module, function: Callable, tensors: Sequence[torch.Tensor | None], about: Hashable):
        """`function(*tensors)`, as a recording, which is made where there is none yet.

        Args:
            about: What the function does, apart from the model, and the shapes and types of the tensors.
        """
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
        key = about, shapes, model.device, model.training, model.config._attn_implementation, autocast
        with self.lock, torch.cuda.device(model.device):
            if self.parts is None or not self.parts.are_the_same():
                self.calls.clear()
                self.parts, self.pool = ModelParts(model), torch.cuda.graph_pool_handle()
                self.is_done = torch.cuda.Event()
            if key not in self.calls:
                self.calls[key] = self._record(function, tensors)
                if len(self.calls) > MAX_RECORDINGS:
                    self.calls.popitem(last=False)
            self.calls.move_to_end(key)
            self.is_done.wait()  # the last call may have been made in another stream
            results = self.calls[key](*tensors)
            self.is_done.record()
            return results

    def _record(self, function, tensors):
        try:
            return Recording(function, tensors, self.pool)
        except RuntimeError as error:
            logger.warning_once(f"generation is not recorded as a CUDA graph, so it is slower: {error}")
            return function
