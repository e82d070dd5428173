"""Several processes with one model each: who this one is, and what they tell one another.

`torchrun` starts them and says so in the environment; `join` reads it. In a process that has not
joined others, and inside `alone`, there is one process of rank 0 and everything here is a no-op.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Of one wait for the others. Rank 0 alone looks into trained models and writes reports meanwhile;
# that a process is gone is seen at once by its closed connection, and by torchrun.
PATIENCE = timedelta(hours=6)
GLOO = "gloo/transport"  # in the text of its errors, which have no class of their own
CHUNK = 2**25  # bytes of `together`
_alone = False


class LostProcess(RuntimeError):
    """Another process of the job is gone, so this one cannot go on."""


def started() -> tuple[int, int]:
    """(rank, how many) of the job that `torchrun` started, whether this process has joined it or
    not; (0, 1) without one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("RANK", 0)) if world > 1 else 0, world


def join(device: str) -> str:
    """Take part in the job that `torchrun` started, if there is one; the device of this process.

    Cards speak through NCCL, each process has the card of its LOCAL_RANK; processors through gloo.

    Raises:
        ValueError: there are more processes than cards on this machine.
    """
    if started()[1] == 1:
        return device
    device = own_card(device)
    on_card = device.startswith("cuda")
    dist.init_process_group("nccl" if on_card else "gloo", timeout=PATIENCE)
    return device


def own_card(device: str) -> str:
    """Of a process that `torchrun` started: the card of its LOCAL_RANK, where cards are asked for.

    Raises:
        ValueError: there are more processes than cards on this machine.
    """
    if not device.startswith("cuda"):
        return device
    local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= cards:
        raise ValueError(
            f"process {local} of this machine has no card of its own, there are {cards}: "
            f"start torchrun with --nproc-per-node {cards} or fewer"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def leave() -> None:
    """The end of the job for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Which of them this is; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


@contextmanager
def alone() -> Iterator[None]:
    """What runs in here knows of no other process: for what rank 0 does while others `wait`."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def apart() -> bool:
    """Whether this is `alone` beside others, which do not see what is done here."""
    return dist.is_initialized() and _alone


@contextmanager
def first() -> Iterator[None]:
    """Rank 0 runs this before the others do: it makes the files that they then find."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


@contextmanager
def connected() -> Iterator[None]:
    """What a lost connection raises in here, in this module or in FSDP, becomes LostProcess."""
    try:
        yield
    except RuntimeError as error:
        of_connection = isinstance(error, dist.DistError) or GLOO in str(error)
        if not (dist.is_initialized() and of_connection):
            raise
        raise LostProcess(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another process of the job "
            f"({error}). Look for that one's own error; the same command goes on from the last "
            "checkpoint"
        ) from error


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def gather(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The rows of every process, by rank; without gradients.

    Args:
        rows: (counts[rank], ...), the same shape but for the first dimension everywhere.
        counts: of each process, which all of them know.
    """
    rows = rows.detach()
    if world() == 1:
        return [rows]
    most = max(counts)
    mine = rows.new_zeros(most, *rows.shape[1:])
    mine[: len(rows)] = rows
    found = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(found, mine)
    return [of[:count] for of, count in zip(found, counts, strict=True)]


@torch.no_grad()
def add(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes into each tensor; one message for each dtype."""
    if world() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        some = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in some])
        dist.all_reduce(flat)
        for t, summed in zip(some, flat.split([t.numel() for t in some]), strict=True):
            t.copy_(summed.view_as(t))


def together(rows: Tensor, device: torch.device) -> Tensor:
    """`rows` (on the CPU) with the sum over all processes, of which each has filled in its own rows
    and left zeros elsewhere. CHUNK bytes at a time, or one row, are on the device, twice."""
    if world() > 1 and len(rows):
        for part in rows.split(max(1, CHUNK * len(rows) // rows.nbytes)):
            there = part.to(device, copy=True)
            add([there])
            part.copy_(there)
    return rows


def spread(
    tokenize: Callable[[Sequence[Any]], list[list[int]]], texts: Sequence[Any], device: torch.device
) -> list[list[int]]:
    """`tokenize(texts)`, of which each process has made every n-th.

    tokenize: makes of each text its token ids (below 2^31), whatever the other texts are.
    """
    mine = tokenize(texts[rank() :: world()])
    if world() == 1:
        return mine
    lengths = torch.zeros(len(texts), dtype=torch.int64)
    lengths[rank() :: world()] = torch.tensor([len(ids) for ids in mine], dtype=torch.int64)
    sizes = together(lengths, device).tolist()
    whole = torch.zeros(sum(sizes), dtype=torch.int32)
    rows = whole.split(sizes)
    for row, ids in zip(rows[rank() :: world()], mine, strict=True):
        row.copy_(torch.tensor(ids, dtype=torch.int32))
    together(whole, device)
    return [row.tolist() for row in rows]


@torch.no_grad()
def require_same(value: float, what: str) -> None:
    """Raise ValueError unless every process has this value (float64, so integers below 2^53)."""
    if world() == 1:
        return
    mine = torch.tensor([value], dtype=torch.float64)
    mine = mine.cuda() if dist.get_backend() == "nccl" else mine
    found = [v.item() for v in gather(mine, [1] * world())]
    if len(set(found)) > 1:
        raise ValueError(f"{what} is {found} in the processes of this job, expected one value")
