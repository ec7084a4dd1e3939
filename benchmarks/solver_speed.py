"""The time that a solver adds around its network calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.results import Part
from benchmarks.solver_errors import GUIDANCE, embedded_model
from benchmarks.variants import Variant, counted
from solver_utils import get_schedule
from torch_utils.seeds import noise
from training.denoisers import Denoiser

SCHEDULE = "discrete"
LIMIT = 0.03  # most of a sampler call that a solver may spend outside the network, on the CPU


class WatchedNet:
    """`net` with every slope call made by `watch(net, x, sigma, cond)`; counts and times are the net's own."""

    def __init__(self, net: Denoiser, watch: Callable[[Denoiser, Tensor, Tensor, object], Tensor]):
        self.net, self.watch = net, watch
        self.device, self.is_flow, self.sigma_inv = net.device, net.is_flow, net.sigma_inv

    @property
    def calls(self) -> int:
        return self.net.calls

    @property
    def rows(self) -> int:
        return self.net.rows

    def slope(self, x: Tensor, sigma: Tensor, cond) -> Tensor:
        return self.watch(self.net, x, sigma, cond)


def start(net: Denoiser, batch: int, num_steps: int) -> tuple[Tensor, Tensor, object]:
    """(x, sigmas, cond) of a run of `batch` images over `num_steps` nodes."""
    sigmas = get_schedule(num_steps, net.sigma_min, net.sigma_max, net.device, SCHEDULE, 1.0, net)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    x = net.initial_state(noise(range(batch), shape).to(net.device), sigmas[0])
    return x, sigmas, net.encode_prompts(["a 3d emoji of bat on a yellow background"] * batch)


def overhead_settings(batches: Sequence[int], nodes: int, repeats: int) -> dict:
    return {
        "model": "emoji",
        "guidance_rate": GUIDANCE,
        "schedule_type": SCHEDULE,
        "nodes": nodes,
        "batches": list(batches),
        "repeats": repeats,
        "limit_cpu": LIMIT,
        "fraction": "(time of the whole sampler call - time inside net.slope) / whole; median over repeats after one "
        "warm-up. On a GPU every slope ends with a wait for the device, so that the rest is host time alone",
        "outside_us_per_step": "the same difference by interval, microseconds",
    }


def timed_run(variant: Variant, net: Denoiser, batch: int, nodes: int) -> tuple[float, float]:
    """(whole, outside the network) of one sampler call, seconds."""
    inside = 0.0
    on_gpu = net.device.type == "cuda"

    def watch(net: Denoiser, x: Tensor, sigma: Tensor, cond) -> Tensor:
        nonlocal inside
        begin = time.perf_counter()
        slope = net.slope(x, sigma, cond)
        if on_gpu:
            torch.cuda.synchronize()
        inside += time.perf_counter() - begin
        return slope

    x, sigmas, cond = start(net, batch, nodes)
    sampler, watched = variant.sampler(nodes), WatchedNet(net, watch)
    if on_gpu:
        torch.cuda.synchronize()
    with torch.no_grad(), counted(variant, net, nodes, batch):
        begin = time.perf_counter()
        sampler(watched, x, sigmas, cond)
        whole = time.perf_counter() - begin
    return whole, whole - inside


def measure_overhead(
    part: Part, variants: Sequence[Variant], device: str, batches: Sequence[int], nodes: int, repeats: int
) -> None:
    """Add the missing rows, one for each variant and batch size."""
    wanted = [
        (variant, batch)
        for batch in batches
        for variant in variants
        if not part.has(variant=variant.label, batch=batch)
    ]
    if not wanted:
        return
    net = embedded_model(device)
    intervals = nodes - 1
    for variant, batch in tqdm(wanted, desc=f"overhead on {device}", unit="run"):
        runs = [timed_run(variant, net, batch, nodes) for _ in range(repeats + 1)][1:]
        outside = statistics.median(rest for _, rest in runs)
        row = {
            "variant": variant.label,
            "solver": variant.solver,
            "options": variant.options,
            "batch": batch,
            "parallel_nfe": variant.cost(nodes).parallel_nfe,
            "seconds": statistics.median(whole for whole, _ in runs),
            "fraction": statistics.median(rest / whole for whole, rest in runs),
            "fraction_max": max(rest / whole for whole, rest in runs),
            "outside_us_per_step": outside / intervals * 1e6,
        }
        part.add(row)
