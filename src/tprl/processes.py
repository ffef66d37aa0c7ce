"""Training and measuring by several processes at once, started by ``accelerate launch``. Alone, all of this does
nothing.

Every process holds the same pruner and draws the same random numbers, so all take the same decisions without talking.
What takes long, scores and gradients, is shared row by row and added up, so that the result depends on the number of
processes no more than a sum does on its order. Runs and results are written by the first process alone; demonstrations
by whichever makes them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

PATIENCE = timedelta(hours=12)
"""For one another: the first process may encode pictures for hours. The launcher notices one that died at once."""


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Work together with the other processes of the launch, if there are any; gives the device of this one.

    Args:
        device: "cpu" joins them by gloo, "cuda" by NCCL, with a GPU each. Where they are joined already, this one's.
    """
    if distributed.is_initialized():
        yield device
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    try:
        yield str(state.device) if count() > 1 else device
    finally:
        state.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def mine() -> slice:
    """The rows of a batch that are this process's to do."""
    return slice(distributed.get_rank(), None, count()) if distributed.is_initialized() else slice(None)


def check_shares(rows: int, name: str) -> None:
    """Raise ValueError where a batch of ``rows`` leaves a process without any."""
    if rows < count():
        raise ValueError(f"{name} {rows} cannot be shared by {count()} processes; allowed: {count()} or more")


def total(values: Tensor) -> Tensor:
    """The sum of what every process gives, on all of them."""
    if not distributed.is_initialized():
        return values
    gpu = distributed.get_backend() == "nccl"
    summed = values.detach().to("cuda" if gpu else "cpu", copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def gathered(share: Tensor, rows: int) -> Tensor:
    """All ``rows`` of a batch, of which every process gives its share, see ``mine``."""
    if not distributed.is_initialized():
        return share
    whole = share.new_zeros(rows, *share.shape[1:])
    whole[mine()] = share
    return total(whole)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up what every process's share gave, in one message."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def agreed(said: bool) -> bool:
    """Whether any process says so."""
    return bool(total(torch.tensor(float(said))) > 0)


def meet() -> None:
    """Wait for one another."""
    agreed(True)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others do, which then find what it wrote."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()
