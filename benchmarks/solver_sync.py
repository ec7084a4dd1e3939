"""Whether the loop of a solver ever waits for a GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.results import Part
from benchmarks.solver_errors import GUIDANCE, embedded_model
from benchmarks.solver_speed import SCHEDULE, WatchedNet, start
from benchmarks.variants import Variant, run_counted
from training.denoisers import Denoiser

SYNC_NODES, SYNC_BATCH = 8, 2
LOOP, DRAIN, NETWORK = "solver loop", "after the loop", "network call"
# What makes the host wait for the device, or would on a GPU: the runtime's waits, copies over the bus, and the
# operators behind `.item()` and boolean indexing.
SYNCS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "Memcpy DtoH",
    "Memcpy HtoD",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)


class SyncDetectorError(RuntimeError):
    """The detector let a planted synchronisation pass."""


def sync_settings() -> dict:
    return {
        "model": "emoji",
        "guidance_rate": GUIDANCE,
        "schedule_type": SCHEDULE,
        "nodes": SYNC_NODES,
        "batch": SYNC_BATCH,
        "looked_for": list(SYNCS),
        "where": "between the first and the last node, network calls included; `solver` and `network` tell whose",
        "debug_mode": "torch.cuda.set_sync_debug_mode('error') over the same stretch; null where it raised nothing",
    }


def forbidden_sync(variant: Variant, net: Denoiser, inputs: tuple) -> str | None:
    """The message of the first synchronising operation of the loop under the debug mode `error`, None without one."""
    x, sigmas, cond = inputs
    last = len(sigmas) - 1

    def switch(i: int, x: Tensor, sigma: Tensor) -> None:
        if i == 0:
            torch.cuda.set_sync_debug_mode("error")
        elif i == last:
            torch.cuda.set_sync_debug_mode("default")

    try:
        run_counted(variant, net, x, sigmas, cond, switch)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def profiled_syncs(variant: Variant, net: Denoiser, inputs: tuple) -> dict[str, dict[str, int]]:
    """Numbers of SYNCS events of the loop, by name, in the solver's own code and in the network's."""
    from torch.profiler import ProfilerActivity, profile, record_function

    x, sigmas, cond = inputs
    last = len(sigmas) - 1
    on_gpu = net.device.type == "cuda"
    stretch = []

    def mark(i: int, x: Tensor, sigma: Tensor) -> None:
        if i == 0:
            if on_gpu:
                torch.cuda.synchronize()  # no earlier copy may run on into the loop
            stretch.append(record_function(LOOP))
            stretch[0].__enter__()
        elif i == last:
            stretch[0].__exit__(None, None, None)
            with record_function(DRAIN):  # the loop's copies end in here at the latest
                if on_gpu:
                    torch.cuda.synchronize()

    def watch(net: Denoiser, x: Tensor, sigma: Tensor, cond) -> Tensor:
        with record_function(NETWORK):
            return net.slope(x, sigma, cond)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        run_counted(variant, WatchedNet(net, watch), x, sigmas, cond, mark)
    return count_syncs(profiler.events())


def count_syncs(events: Iterable) -> dict[str, dict[str, int]]:
    """{"solver": {name: count}, "network": {name: count}} from a profiler's events, with names of SYNCS.

    An event on the host belongs to the loop if it begins inside the stretch LOOP, one on the device if it begins before
    the end of DRAIN; it is the network's if it begins inside a stretch NETWORK. (A copy of the network's that the
    device starts later than the host asked for it may thus be counted as the solver's, never as nobody's.)
    """
    from torch.autograd import DeviceType

    events = list(events)
    stretches = {LOOP: [], DRAIN: [], NETWORK: []}
    for event in events:
        if event.name in stretches and event.device_type == DeviceType.CPU:
            stretches[event.name].append((event.time_range.start, event.time_range.end))
    [(begin, end)], [(_, drained)] = stretches[LOOP], stretches[DRAIN]
    counts = {"solver": Counter(), "network": Counter()}
    for event in events:
        name = next((name for name in SYNCS if event.name.startswith(name) and "Async" not in event.name), None)
        moment = event.time_range.start
        if name is None or not begin <= moment <= (end if event.device_type == DeviceType.CPU else drained):
            continue
        inside = any(first <= moment <= last for first, last in stretches[NETWORK])
        counts["network" if inside else "solver"][name] += 1
    return {owner: dict(sorted(found.items())) for owner, found in counts.items()}


def check_detector(net: Denoiser, inputs: tuple) -> None:
    """Raise SyncDetectorError unless both methods see a planted wait in the network."""

    def waiting(net: Denoiser, x: Tensor, sigma: Tensor, cond) -> Tensor:
        slope = net.slope(x, sigma, cond)
        return slope * (1 if slope.sum().item() < float("inf") else 0)

    planted, ddim = WatchedNet(net, waiting), Variant("ddim", "ddim")
    seen = profiled_syncs(ddim, planted, inputs)["network"]
    message = forbidden_sync(ddim, planted, inputs)
    waited = any(name.startswith("cuda") for name in seen)
    if not seen.get("aten::_local_scalar_dense") or not waited or message is None:
        raise SyncDetectorError(f"a planted .item() was not seen: the profiler saw {seen}, debug mode said {message}")


def measure_sync(part: Part, variants: Sequence[Variant]) -> None:
    """Add the missing rows, one for each variant. Needs CUDA."""
    wanted = [variant for variant in variants if not part.has(variant=variant.label)]
    if not wanted:
        return
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
    net = embedded_model("cuda")
    inputs = start(net, SYNC_BATCH, SYNC_NODES)
    check_detector(net, inputs)
    for variant in tqdm(wanted, desc="waits for the GPU", unit="solver"):
        run_counted(variant, net, *inputs)  # warm-up: the first calls load kernels and choose algorithms
        events = profiled_syncs(variant, net, inputs)
        part.add(
            {
                "variant": variant.label,
                "solver": variant.solver,
                "options": variant.options,
                "syncs": sum(count for found in events.values() for count in found.values()),
                "solver_events": events["solver"],
                "network_events": events["network"],
                "debug_mode": forbidden_sync(variant, net, inputs),
            }
        )
