"""What `benchmarks.sd15` measures: each function adds rows (figure, value, unit, to reach, note) to a part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Part
from solvers import epd_sampler
from torch_utils import distributed
from training.denoisers.stable_diffusion import StableDiffusion
from training.generate import generate_batch, initial_latents, table_schedule
from training.ppo.cold_start import cold_start_table
from training.ppo.config import PPOConfig
from training.ppo.policy import EPDParamPolicy
from training.ppo.rdpo import RDPO
from training.ppo.reward_base import Reward
from training.ppo.reward_mix import RewardMix
from training.ppo.rl_runner import EPDRolloutRunner, ImageScorer, Rollout
from training.table import SolverTable

INTERVALS = 10
STEP_IMAGES = 8
RANKS_IMAGES = 16
WARM_UP_STEPS = 3
MATMUL_SIZE = 8192
LOAD_S = 4.0
GIB = 2**30


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work()` after one warm-up: CUDA events on a GPU, the clock on the CPU."""
    work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call by the clock, all that it started on the GPU included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """Memory that tensors take at the peak of `work()`, weights included; 0 on the CPU."""
    if device.type != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def prompts(count: int) -> list[str]:
    return [f"a photo of {number + 2} red cubes on a wooden table" for number in range(count)]


def trajectory(net: StableDiffusion, batch: int, table: SolverTable) -> Callable[[], Tensor]:
    """The whole sampler call of `batch` images, prompts encoded and noise drawn beforehand."""
    sigmas = table_schedule(table, net)
    x, cond = initial_latents(net, prompts(batch), list(range(batch)), sigmas)
    return partial(epd_sampler, net, x, sigmas, cond, table=table)


def compiled(net: StableDiffusion, work: Callable[[], object]) -> float:
    """Run `work()` from now on compiled, and once; seconds of that call, which compiles what it calls."""
    net.compile_calls(True)
    return seconds(work, net.device)


def flop_per_row(net: StableDiffusion) -> float:
    """Operations of one row through diffusers' UNet: what the work is counted by, whatever is saved of it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(net.unet.config)
        x = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution)
        with FlopCounterMode(display=False) as counter:
            unet(x, torch.ones(1), net.empty_text.to("meta", torch.float32))
    return float(counter.get_total_flops())


def matmul_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """TFLOP/s of a square matrix product, at once and under load: a GPU that has reached its power limit is slower."""
    size, load_s = (MATMUL_SIZE, LOAD_S) if device.type == "cuda" else (256, 0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def rate() -> float:
        return 2e-9 * size**3 / milliseconds(lambda: a @ b, device, 20)

    at_once, started = rate(), time.perf_counter()
    while time.perf_counter() - started < load_s:
        rate()
    return at_once, rate()


@torch.no_grad()
def measure_sampling(
    part: Part, net: StableDiffusion, batch: int, to_reach: float, repeats: int, with_single: bool
) -> None:
    """A whole trajectory with K = 2; with `with_single` also K = 1 and the ratio of the two."""
    add = partial(_add, part)
    rate, loaded = matmul_rates(net.device, net.dtype)
    work = trajectory(net, batch, cold_start_table(INTERVALS + 1, 2))
    net.compile_calls(False)
    first = seconds(work, net.device)
    plain = milliseconds(work, net.device, repeats)
    compiling = compiled(net, work)
    took = milliseconds(work, net.device, repeats)
    tflop = flop_per_row(net) * 2 * 3 * INTERVALS * batch / 1e12
    achieved = 1000 * tflop / took
    note = f"{tflop:.1f} TFLOP; {achieved:.0f} TFLOP/s, {achieved / rate:.0%} of a matrix product's {rate:.0f}, "
    note += f"{achieved / loaded:.0%} of the {loaded:.0f} it reaches under load"
    add(f"{INTERVALS} intervals, K = 2, batch {batch}", took, "ms", to_reach, note)
    add(f"the same, --compile off, batch {batch}", plain, "ms", None, f"the very first trajectory {first:.1f} s")
    add(f"compiling both row counts, batch {batch}", compiling, "s", None, "seconds where the cache holds it")
    if with_single:
        single = trajectory(net, batch, cold_start_table(INTERVALS + 1, 1))
        compiled(net, single)
        one = milliseconds(single, net.device, repeats)
        add(f"K = 2 over K = 1, batch {batch}", took / one, "", 1.35, f"K = 1: {one:.1f} ms")


@dataclass(frozen=True)
class Steps:
    """Steps of PPO, after three that compile and warm up; seconds of each."""

    compiling: float
    whole: list[float]
    rollouts: list[Rollout]
    updates: list[float]
    losses: list[float]


def ppo_steps(net: StableDiffusion, reward: Reward, images: int, repeats: int) -> Steps:
    """Tables drawn, images made 8 at a time, decoded, scored, the policy updated; the ranks share out the images."""
    start = cold_start_table(INTERVALS + 1, 2)
    ppo = PPOConfig(steps=100, rollout_batch_size=images, rloo_k=4, rollout_micro_batch=STEP_IMAGES)
    policy = EPDParamPolicy(start)
    learner = RDPO(policy, ppo, seed=0)
    runner = EPDRolloutRunner(net, RewardMix.of(reward), prompts(2 * images), start, ppo, seed=0)
    rollouts, updates, losses = [], [], []

    def step(number: int) -> None:
        rollouts.append(runner.rollout(learner.draw(runner, number)))
        started = time.perf_counter()
        losses.append(learner.update(number, rollouts[-1])["loss"])
        updates.append(time.perf_counter() - started)

    net.compile_calls(True)
    whole = [seconds(partial(step, number), net.device) for number in range(1, WARM_UP_STEPS + 1 + repeats)]
    kept = slice(WARM_UP_STEPS, None)
    return Steps(whole[0], whole[kept], rollouts[kept], updates[kept], losses[kept])


def measure_step(part: Part, net: StableDiffusion, reward: Reward, repeats: int) -> None:
    """A step of PPO and its parts."""
    add = partial(_add, part)
    steps = ppo_steps(net, reward, STEP_IMAGES, repeats)
    making = [rollout.seconds_generation for rollout in steps.rollouts]
    judging = [rollout.seconds_reward for rollout in steps.rollouts]
    add(f"PPO step of {STEP_IMAGES} images", _median_ms(steps.whole), "ms", 1300.0, "by the clock")
    add("of it: images", _median_ms(making), "ms", None, "prompts, 10 intervals, decoding")
    add("of it: rewards", _median_ms(judging), "ms", None, f"{reward.name}, {reward.dtype}")
    add("of it: update", _median_ms(steps.updates), "ms", None, "4 epochs, on the CPU")
    add("the step that compiles", steps.compiling, "s", None, "seconds where the cache holds it")
    size = net.img_resolution
    for count in (1, STEP_IMAGES):
        latents = torch.randn(count, net.img_channels, size, size, device=net.device)
        with torch.no_grad():
            compiled(net, partial(net.decode, latents))
            took = milliseconds(partial(net.decode, latents), net.device, repeats)
        add(f"decoding {count}", took, "ms", None, "")


def measure_ranks(part: Part, net: StableDiffusion, reward: Reward, repeats: int, alone: dict | None) -> None:
    """A step of PPO on all ranks together, and one image made by all of them; beside `alone`, the part of one rank."""
    ranks = distributed.world_size()
    steps = ppo_steps(net, reward, RANKS_IMAGES, repeats)
    if ranks > 1:
        net.share_rows()
    with torch.no_grad():
        work = trajectory(net, 1, cold_start_table(INTERVALS + 1, 2))
        compiled(net, work)
        one_image = milliseconds(work, net.device, repeats)
    loss = f"last loss {steps.losses[-1]:.9f}, reward {steps.rollouts[-1].rewards.mean():.9f}"
    speed = f"{RANKS_IMAGES / statistics.median(steps.whole):.1f} images/s; {loss}"
    found = [
        (f"PPO step of {RANKS_IMAGES} images", _median_ms(steps.whole), 1 / 1.9, speed),
        ("1 image", one_image, 1 / 1.3, ""),
    ]
    for row, (figure, value, share, note) in enumerate(found):
        gpus = f"{ranks} GPU" + ("s" if ranks > 1 else "")
        _add(part, f"{figure} on {gpus}", value, "ms", None, note)
        if ranks == 2 and alone is not None:
            _add(part, f"the same over that of 1 GPU: {figure}", value / alone["rows"][row]["value"], "", share, "")


@torch.no_grad()
def measure_memory(part: Part, net: StableDiffusion, batches: tuple[int, ...], max_rows: int) -> None:
    """Peak of whole batches, prompts to pictures, not compiled; the last batch but one again with `--max-rows`."""
    net.compile_calls(False)
    table = cold_start_table(INTERVALS + 1, 2)
    sigmas = table_schedule(table, net)
    networks = net.unet, net.vae, net.text_encoder
    weights = sum(part.numel() * part.element_size() for network in networks for part in network.parameters()) / GIB

    def images(batch: int, rows: int | None) -> Tensor:
        sampler = partial(epd_sampler, table=table, max_rows=rows)
        return generate_batch(net, prompts(batch), list(range(batch)), sampler, sigmas)

    for batch, rows in [*((batch, None) for batch in batches), (batches[-2], max_rows)]:
        peak = peak_gib(partial(images, batch, rows), net.device)
        limit = 16e9 / GIB if rows is not None else None
        label = f"batch {batch}" + (f", --max-rows {rows}" if rows else "")
        note = f"not compiled; weights {weights:.1f} GiB of it" if batch == batches[0] else ""
        _add(part, label, peak, "GiB", limit, note)


def measure_gradients(part: Part, net: StableDiffusion, reward: Reward, micro_batches: tuple[int, ...]) -> None:
    """The reward's gradient to the table of 8 images, by `ppo.rollout_micro_batch`."""
    start = cold_start_table(INTERVALS + 1, 2)
    arrays = EPDParamPolicy(start).mean_sample(STEP_IMAGES).arrays
    for micro_batch in micro_batches:
        scorer = ImageScorer(net, RewardMix.of(reward), start, micro_batch)

        def work(scorer: ImageScorer = scorer) -> None:
            for part in scorer.batches(range(STEP_IMAGES)):
                rows = slice(part.start, part.stop)
                few = type(arrays)(*(array[rows] for array in arrays))
                scorer.gradients(few, prompts(STEP_IMAGES)[rows], list(part))

        peak = peak_gib(work, net.device)  # the first call, in which libraries choose their ways
        took = seconds(work, net.device)
        label = f"gradients of {STEP_IMAGES} images, {micro_batch} at a time"
        _add(part, label, took, "s", None, f"{peak:.1f} GiB")


def _median_ms(times: list[float]) -> float:
    return 1000 * statistics.median(times)


def _add(part: Part, figure: str, value: float, unit: str, to_reach: float | None, note: str) -> None:
    part.add({"figure": figure, "value": value, "unit": unit, "to_reach": to_reach, "note": note})
