"""Process groups: the same script runs with plain `python` or with `torchrun --nproc_per_node=N`.

Without `torchrun` no process group exists and every helper is the identity, whatever MASTER_ADDR or MASTER_PORT say.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar, overload

import torch
import torch.distributed as dist

from torch_utils import determinism
from torch_utils.errors import UserError

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # of Linux' prctl
LEAVE_S = 10  # how long a process may take to end after it failed

_device: torch.device | None = None
_roll_call: dist.ProcessGroup | None = None  # Gloo, of all ranks
_timeout = datetime.timedelta(0)  # how long they wait for each other


class DistributedError(UserError):
    """A launch that cannot work: more processes than GPUs, an unknown device, no meeting point."""


def init(device: str = "auto", timeout_minutes: float = 30.0) -> None:
    """Choose this process's device and, under `torchrun`, join the process group. Calling it again changes nothing.

    device           "auto" (a GPU where there is one), "cpu", "cuda" (the GPU of this process), or "cuda:N" (alone).
    timeout_minutes  How long the ranks wait for a slow or lost one before they stop and name it.

    The group uses NCCL on GPUs and Gloo on the CPU. A process whose launcher dies gets SIGTERM. Raises
    `DistributedError` when the device or the group cannot be had, and `ValueError` when an earlier call chose another
    kind of device.
    """
    global _device
    if _device is not None:
        if device != "auto" and device.split(":")[0] != _device.type:
            raise ValueError(f"distributed.init: device {device} was asked for after {_device} had been chosen")
        return
    ranks = _environment_number("WORLD_SIZE") if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1
    local_rank = _environment_number("LOCAL_RANK") if ranks > 1 else 0
    chosen = _choose_device(device, local_rank, ranks)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        determinism.prepare()
    if ranks > 1:
        _die_with_launcher()
        _join_group(chosen, timeout_minutes)
    _device = chosen


@contextlib.contextmanager
def joined(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[None]:
    """`init` for the length of a `with`.

    Its end is the group's orderly one, which all ranks take part in. An exception waits for no other rank: the process
    has `LEAVE_S` seconds to say what is wrong and to end, then the system ends it.
    """
    init(device, timeout_minutes)
    try:
        yield
        shutdown()
    except BaseException:
        _abandon()
        raise


def _environment_number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise DistributedError(f"environment variable {name} is {text!r}, not a number: use torchrun, or unset RANK")
    return int(text)


def _choose_device(name: str, local_rank: int, ranks: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise DistributedError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise DistributedError(f"unsupported device {name!r}: use auto, cpu, cuda or cuda:N")
    if chosen.index is not None and ranks > 1:
        raise DistributedError(f"device {name} under torchrun would put every process on one GPU: use cuda")
    index = local_rank if chosen.index is None else chosen.index
    seen = torch.cuda.device_count()
    if index >= seen:
        advice = "lower --nproc_per_node, choose another GPU" if seen else "python -m training.ppo.doctor tells more"
        raise DistributedError(
            f"GPU {index} was asked for, but {seen or 'none'} can be seen here: {advice}, or use the device cpu"
        )
    return torch.device("cuda", index)


def _die_with_launcher() -> None:
    """Ask the system for SIGTERM when the parent process ends, so that no rank goes on without anybody's knowledge."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _join_group(chosen: torch.device, timeout_minutes: float) -> None:
    global _roll_call, _timeout
    _timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            timeout=_timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        # Of NCCL's ranks nobody could say which one is missing.
        # The -100 in new_group's type is for ranks outside of the group.
        _roll_call = dist.group.WORLD if chosen.type == "cpu" else dist.new_group(timeout=_timeout, backend="gloo")  # type: ignore[assignment]
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise DistributedError(
            f"rank {os.environ['RANK']} could not join the process group at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({reason}): is the port free (--master_port), did all ranks start?"
        ) from error


def _call_roll() -> None:
    """Wait until every rank is here. Raises `DistributedError` naming the one that is not within the group's time."""
    try:
        dist.monitored_barrier(_roll_call, _timeout)
    except RuntimeError as error:
        # What follows is of Gloo's connections, and of no use to who reads it but for this.
        reason, _, cause = " ".join(str(error).split()).partition(" Original exception: ")
        ended = " (its process ended)" if "Connection" in cause else ""
        raise DistributedError(
            f"rank {dist.get_rank()} stops, for another one is lost or hangs: {reason}{ended}"
        ) from error


def shutdown() -> None:
    """Leave the process group together with the other ranks, if there is one, and forget the device.

    Raises `DistributedError` naming a rank that does not come.
    """
    global _device, _roll_call
    if dist.is_initialized():
        _call_roll()  # NCCL's own end would wait for ever, and Gloo's leave somebody behind
        dist.destroy_process_group()
    _device = _roll_call = None


def _abandon() -> None:
    """Forget the device and see to it that this process can end, whatever the other ranks of its group do."""
    global _device, _roll_call
    world = dist.group.WORLD
    if world is not None:
        # NCCL's orderly end would wait here for a rank that hangs, and the message of the error with it.
        signal.alarm(LEAVE_S)
        if dist.get_backend() == "nccl":
            atexit.register(world.abort)
    _device = _roll_call = None


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Count of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Count of processes on this machine, by what `torchrun` says; 1 when alone."""
    return _environment_number("LOCAL_WORLD_SIZE") if world_size() > 1 else 1


def is_main() -> bool:
    """Whether this is rank 0, the process that writes files and messages."""
    return rank() == 0


def device() -> torch.device:
    """The device that `init` chose. Raises `RuntimeError` before `init`."""
    if _device is None:
        raise RuntimeError("call torch_utils.distributed.init() before device()")
    return _device


def print0(*args: object, file: TextIO | None = None) -> None:
    """Print from rank 0 only, to stderr unless `file` is given, and flush."""
    if is_main():
        print(*args, file=sys.stderr if file is None else file, flush=True)


def barrier() -> None:
    """Wait until every rank is here. Raises `DistributedError` naming a rank that does not come."""
    if world_size() > 1:
        _call_roll()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Join `tensor [n, ...]` of all ranks along dimension 0, in rank order: `[world_size * n, ...]` on every rank.

    The result is on `tensor.device` and carries no gradient. Raises `ValueError` on every rank when a tensor has no
    dimension or when shapes or dtypes differ, where a bare collective would hang or scramble the values;
    `DistributedError` naming a rank that does not come.
    """
    if tensor.ndim == 0:
        raise ValueError("all_gather needs a tensor with at least one dimension")
    if world_size() == 1:
        return tensor.detach()
    kinds = all_gather_objects((tuple(tensor.shape), str(tensor.dtype)))
    if len(set(kinds)) > 1:
        raise ValueError(f"all_gather needs equal shapes and dtypes on all ranks, got {kinds}")
    local = tensor.detach().to(device()).contiguous()
    # Gloo has no boolean type.
    carried = local.to(torch.uint8) if tensor.dtype == torch.bool else local
    parts = [torch.empty_like(carried) for _ in range(world_size())]
    dist.all_gather(parts, carried)
    return torch.cat(parts).to(device=tensor.device, dtype=tensor.dtype)


def share_rows(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function(*inputs)`, its R rows worked out by the ranks in equal parts: the whole `[R, ...]` on every rank.

    All inputs have R >= 1 rows, equal on all ranks, and row r of the result must come from row r of the inputs alone.
    What is left over of an uneven share repeats the last row. Waits for no device.
    """
    if world_size() == 1:
        return function(*inputs)
    rows = len(inputs[0])
    share = -(-rows // world_size())
    mine = torch.arange(rank() * share, (rank() + 1) * share, device=inputs[0].device).clamp_(max=rows - 1)
    part = function(*(tensor.index_select(0, mine) for tensor in inputs)).contiguous()
    whole = part.new_empty(share * world_size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part)
    return whole[:rows]


def all_gather_objects(obj: T) -> list[T]:
    """The picklable `obj` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [obj]
    _call_roll()
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: T, src: int = 0) -> T:
    """The picklable `obj` of rank `src`, on every rank."""
    if world_size() == 1:
        return obj
    _call_roll()
    box = [obj]
    dist.broadcast_object_list(box, src=src, device=device())
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and give its result to all ranks; its `UserError` ends them all, told once."""
    outcomes: list[T | UserError] = []
    if is_main():
        try:
            outcomes.append(function())
        except UserError as error:
            outcomes.append(error)
    (outcome,) = broadcast_object(outcomes)
    if isinstance(outcome, UserError):
        if is_main():
            raise outcome
        sys.exit(2)
    return outcome


@overload
def shard(items: int) -> range: ...
@overload
def shard(items: Sequence[T]) -> Sequence[T]: ...
def shard(items: int | Sequence[T]) -> range | Sequence[T]:
    """This rank's contiguous part of `items` (an integer n means range(n)); lengths differ by at most one.

    Parts follow each other in rank order, so that `all_gather` of equal parts restores the order of the whole.
    """
    whole = range(items) if isinstance(items, int) else items
    start, stop = (len(whole) * r // world_size() for r in (rank(), rank() + 1))
    return whole[start:stop]
