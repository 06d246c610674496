"""Training batches in order, with their rows drawn and tokenised in other processes.

There is no state to save: batch number i is a pure function of the seed and of i, whoever makes it. So torch's
DataLoader is enough, a run may go on with another number of workers, and what is counted is counted where it is used.
"""

import os
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from .sampler import Batch, Group, TaskSampler

Key = tuple[int, str, int]  # sampler, task and number of a group


class _Groups(Dataset[Group]):
    """The groups of several samplers by their keys."""

    def __init__(self, samplers: Sequence[TaskSampler]) -> None:
        self.samplers = samplers

    def __getitem__(self, key: Key) -> Group:
        index, task, group = key
        return self.samplers[index].make_group(task, group)


class _Keys:
    """The groups that the batches of all samplers need, in the order in which they first need them."""

    def __init__(self, samplers: Sequence[TaskSampler], start: int) -> None:
        self.samplers, self.start = samplers, start

    def __iter__(self) -> Iterator[Key]:
        newest: dict[tuple[int, str], int] = {}
        for number in range(self.start, len(self.samplers[0])):
            for index, sampler in enumerate(self.samplers):
                task, group = sampler.group_of(number)
                if newest.get((index, task)) != group:
                    newest[index, task] = group
                    yield index, task, group


def load_updates(samplers: Sequence[TaskSampler], start: int, num_workers: int = 0) -> Iterator[tuple[Batch, ...]]:
    """Batch number `start` of every sampler, then the next of every one, and so on; the same with any workers.

    Args:
        samplers: Of one length.
        num_workers: Processes that draw the rows and tokenise them; 0 for none but this one. Each reads a stream of
            rows by itself.
    """
    if not num_workers:
        yield from zip(*(sampler.batches(start) for sampler in samplers))
        return
    loader = DataLoader(
        _Groups(samplers),
        batch_size=None,
        sampler=_Keys(samplers, start),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the global one stays as it is
    )
    groups = iter(loader)
    for number in range(start, len(samplers[0])):
        for sampler in samplers:
            task, group = sampler.group_of(number)
            if not sampler.has_group(task, group):
                sampler.take_group(task, group, next(groups))
        yield tuple(sampler[number] for sampler in samplers)


def _start_worker(index: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers warns of the fork in every worker


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
