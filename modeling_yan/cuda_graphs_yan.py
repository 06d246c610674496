"""Generation recorded as CUDA graphs: once recorded, a call costs the host little more than one launch."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)
MAX_RECORDINGS = 32  # of a model; then the one that has not been asked for the longest time is given up

Program = Callable[..., dict[str, Any]]  # takes tensors, and returns a dict of tensors and other values


class ModelFingerprint:
    """The modules, weights and hooks that a model has, and whether they are still the same.

    A recording reads the weights where they were. It follows whatever changes them in place, as an optimizer does. It
    knows nothing of hooks, of modules in another mode, or of weights that were replaced or moved. The memory of the
    weights as they were is kept until a comparison has found that out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = list(model.modules())
        self.attributes = list(map(vars, self.modules))
        tables = [table for module in self.modules for table in self._tables_of(module)]
        self.tables, self.empty_tables = [table for table in tables if table], [table for table in tables if not table]
        self.members = self._current_members()
        tensors = [member for member in self.members if torch.is_tensor(member)]
        self.tensors = [tensor for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)]
        self.storages = [tensor.untyped_storage() for tensor in self.tensors]  # kept, as what is recorded reads them
        self.state = self._current_state()
        is_plain = len(self.tensors) == len(tensors) and not any(map(self._hides_state, self.modules[1:]))
        self.can_be_recorded = is_plain and {tensor.device for tensor in tensors} == {model.device}

    @staticmethod
    def _tables_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
        hooks = module._forward_hooks, module._forward_pre_hooks
        return module._modules, module._parameters, module._buffers, *hooks

    @staticmethod
    def _hides_state(module: nn.Module) -> bool:
        """Whether it may change unseen: layers of PEFT in their lists, those of accelerate in what they call."""
        return hasattr(module, "merged_adapters") or "forward" in vars(module)

    def _current_members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.tables)))

    def _current_state(self) -> tuple[list[int], list[bool], list[int]]:
        """Addresses, modes, and numbers of attributes, of which a module gets a new one where it is patched."""
        addresses, modes = map(torch.Tensor.data_ptr, self.tensors), map(itemgetter("training"), self.attributes)
        return list(addresses), list(modes), list(map(len, self.attributes[1:]))

    def matches(self) -> bool:
        """In some tenth of a millisecond."""
        members = self._current_members()
        is_same = len(members) == len(self.members) and all(map(is_, members, self.members))
        return is_same and not any(self.empty_tables) and self._current_state() == self.state


class Recording:
    """A function of tensors as a CUDA graph, which is replayed on copies of its arguments.

    Args:
        function: Takes the tensors and returns a dict of tensors and other values; must not wait for the device.
        tensors: Arguments, None among them, whose shapes and types those of all calls have.
        pool, stream: What it is recorded with. Recordings that have both in common share their memory, and must not be
            replayed at the same time.

    Raises:
        RuntimeError: The function waits for the device.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, function: Program, tensors: Sequence[torch.Tensor | None], pool: Any, stream: torch.cuda.Stream
    ) -> None:
        self.arguments = [None if tensor is None else tensor.clone() for tensor in tensors]
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        # without its cache, from which autocast gives weights that it converted earlier and will forget
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with torch.cuda.stream(stream), autocast:
            try:
                self._warm_up(function)
                self._record(function, pool)
            finally:
                current.wait_stream(stream)

    def _warm_up(self, function: Program) -> None:
        """Call it, first to be compiled, then to find out whether it waits: a recording must not fail half-way."""
        function(*self.arguments)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(*self.arguments)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def _record(self, function: Program, pool: Any) -> None:
        # cuBLAS keeps the memory that it works in for each stream: the graph needs memory of its own pool, because
        # whatever else records graphs in this process lets go of the rest.
        torch._C._cuda_clearCublasWorkspaces()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            self.results = function(*self.arguments)
        finally:
            try:
                self.graph.capture_end()
            finally:
                torch._C._cuda_clearCublasWorkspaces()

    def __call__(self, *tensors: torch.Tensor | None) -> dict[str, Any]:
        for argument, tensor in zip(self.arguments, tensors, strict=True):
            if argument is not None and tensor is not None:
                argument.copy_(tensor)
        self.graph.replay()
        return {name: result.clone() if torch.is_tensor(result) else result for name, result in self.results.items()}


class CudaGraphCache:
    """The recordings of one model. They are no part of it: a copy, also a pickled one, begins without any."""

    pool: tuple[int, int]  # all calls have these in common, from the first one on
    stream: torch.cuda.Stream
    is_done: torch.cuda.Event

    def __init__(self) -> None:
        self.parts: ModelFingerprint | None = None
        self.calls: OrderedDict[Hashable, Program] = OrderedDict()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaGraphCache":
        return CudaGraphCache()

    def __reduce__(self) -> tuple[type["CudaGraphCache"], tuple[()]]:
        return CudaGraphCache, ()

    def call(
        self, model: PreTrainedModel, function: Program, tensors: Sequence[torch.Tensor | None], about: Hashable
    ) -> dict[str, Any]:
        """`function(*tensors)`, as a recording, which is made where there is none yet.

        Args:
            tensors: Its arguments, the first of them on the model's GPU.
            about: What the function does, apart from the model, and the shapes and types of the tensors.
        """
        with self.lock, torch.cuda.device_of(tensors[0]):
            key = self._key(model, tensors, about)
            known = self.calls.get(key)
            # the model is compared while the GPU computes: results of a model that has changed are thrown away
            results = None if known is None else self._run(known, tensors)
            parts = self.parts
            if parts is None or not parts.matches():
                parts, results = self._begin_anew(model), None
            if not parts.can_be_recorded:
                return function(*tensors)
            if results is None:
                known = self._record(function, tensors, key)
                results = self._run(known, tensors)
            self.calls.move_to_end(key)
            return results

    def _begin_anew(self, model: PreTrainedModel) -> ModelFingerprint:
        if self.parts is not None:
            self.is_done.synchronize()  # what is given up must have been replayed
        self.calls.clear()
        self.parts, self.pool = ModelFingerprint(model), torch.cuda.graph_pool_handle()
        self.stream, self.is_done = torch.cuda.Stream(), torch.cuda.Event()
        return self.parts

    @staticmethod
    def _key(model: PreTrainedModel, tensors: Sequence[torch.Tensor | None], about: Hashable) -> Hashable:
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
        chosen = model.config._attn_implementation, model.config._experts_implementation
        return about, shapes, chosen, autocast, precision

    def _run(self, recording: Program, tensors: Sequence[torch.Tensor | None]) -> dict[str, Any]:
        self.is_done.wait()  # the last call may have been made in another stream
        results = recording(*tensors)
        self.is_done.record()
        return results

    def _record(self, function: Program, tensors: Sequence[torch.Tensor | None], key: Hashable) -> Program:
        try:
            recording: Program = Recording(function, tensors, self.pool, self.stream)
        except RuntimeError as error:
            logger.warning_once(f"generation is not recorded as a CUDA graph, so it is slower: {error}")
            recording, self.pool = function, torch.cuda.graph_pool_handle()
        self.calls[key] = recording
        if len(self.calls) > MAX_RECORDINGS:
            self.calls.popitem(last=False)
        return recording
