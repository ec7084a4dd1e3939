"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import pytest
import torch
from launchers import NEEDS_A_GPU

from benchmarks.scorer_models import pictures, random_reward
from benchmarks.sd15_measures import prompts
from solvers import epd_sampler
from torch_utils.determinism import fixed_order
from torch_utils.seeds import noise
from training.denoisers import create_model
from training.generate import table_schedule
from training.ppo.cold_start import cold_start_table
from training.ppo.config import PUBLISHED_REWARDS
from training.ppo.policy import EPDParamPolicy
from training.ppo.reward_base import exact_float32
from training.ppo.reward_mix import RewardMix
from training.ppo.reward_multi import create_reward
from training.ppo.rl_runner import ImageScorer

pytestmark = NEEDS_A_GPU

BATCH, NUM_POINTS = 16, 8


def peak_mib(work) -> float:
    """Memory that `work()` needs at its peak beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def test_memory_of_parallel_points_is_that_of_the_network():
    """A stage of B*K rows needs what one network call of as many rows needs, and `max_rows` brings it down."""
    net = create_model("emoji", guidance_rate=7.5, device="cuda")
    table = cold_start_table(3, NUM_POINTS)
    sigmas = table_schedule(table, net)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    x = net.initial_state(noise(range(BATCH), shape).cuda(), sigmas[0])
    cond = net.encode_prompts(["a cat"] * BATCH)

    def bare(rows: int) -> float:
        many, many_cond = x.repeat_interleave(rows // BATCH, 0), cond.repeat_interleave(rows // BATCH)
        return peak_mib(lambda: net.slope(many, sigmas[0], many_cond))

    def epd(max_rows: int | None) -> float:
        return peak_mib(lambda: epd_sampler(net, x, sigmas, cond, table=table, max_rows=max_rows))

    net.slope(x, sigmas[0], cond)  # libraries take their workspace at the first call
    figures = {
        "network, 16 rows": bare(BATCH),
        "network, 128 rows": bare(BATCH * NUM_POINTS),
        "epd, K = 8": epd(None),
        "epd, K = 8, max_rows 16": epd(BATCH),
    }
    print({name: f"{mib:.1f} MiB" for name, mib in figures.items()})
    few, many, whole, split = figures.values()
    # Beside the activations: the B*K points, their slopes and the repeated condition, some latents' worth each.
    latents = BATCH * NUM_POINTS * 4 * x[0].numel() / 2**20
    condition = BATCH * NUM_POINTS * 4 * cond.text[0].numel() / 2**20
    assert whole <= many + 8 * latents + condition
    assert split <= few + 8 * latents + condition


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_on_the_gpu_point_where_those_on_the_cpu_do(precision):
    """The pathwise gradient of two images, summed: nearly parallel and of about the same length.

    At guidance 1 and many intervals, where rounding is not amplified; in float32 without TF32, whose error is.
    """
    start = cold_start_table(11, 2)
    sample = EPDParamPolicy(start).mean_sample(2)
    found = []
    for device, kind in (("cpu", "float32"), ("cuda", precision)):
        net = create_model("emoji", guidance_rate=1.0, device=device, precision=kind)
        scorer = ImageScorer(net, RewardMix.of(create_reward("emoji_reward", device=device)), start, None)
        with exact_float32():
            scores, gradients = scorer.gradients(sample.arrays, ["a red heart", "a cat"], [1, 2])
        found.append((scores, torch.cat([part.sum(0).flatten() for part in gradients])))
    (cpu_scores, cpu), (gpu_scores, gpu) = found
    torch.testing.assert_close(gpu_scores, cpu_scores, atol=0.02, rtol=0)
    assert torch.cosine_similarity(cpu, gpu, dim=0) > (0.9999 if precision == "float32" else 0.99)
    assert gpu.norm() / cpu.norm() == pytest.approx(1, abs=0.01 if precision == "float32" else 0.05)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_gradients_are_the_same_every_time(precision, capfd):
    """Without a fixed order, eight gradients in float32 or bfloat16 differ by 0.4 to 3 % (H200)."""
    start = cold_start_table(5, 2)
    net = create_model("emoji", guidance_rate=7.5, device="cuda", precision=precision)
    scorer = ImageScorer(net, RewardMix.of(create_reward("emoji_reward", device="cuda")), start, None)
    arrays = EPDParamPolicy(start).mean_sample(8).arrays
    one, *others = (scorer.gradients(arrays, ["a red heart", "a cat"] * 4, list(range(8))) for _ in range(4))
    for other in others:
        assert torch.equal(one[0], other[0])
        assert all(torch.equal(part, same) for part, same in zip(one[1], other[1], strict=True))
    assert not capfd.readouterr().err


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("metric", PUBLISHED_REWARDS)
def test_gradients_of_every_scorer_have_a_fixed_order(metric, amp, tmp_path):
    reward = random_reward(metric, tmp_path, torch.device("cuda"), amp, tiny=True)
    images = pictures(4, 300, torch.device("cuda")).requires_grad_()
    with fixed_order():
        one, other = (torch.autograd.grad(reward.score(images, prompts(4)).sum(), images)[0] for _ in range(2))
    assert torch.equal(one, other) and one.any()


@pytest.fixture(scope="module")
def compiled():
    return create_model("emoji", guidance_rate=7.5, device="cuda", precision="float16", compile_mode="default")


def start_of(net, batch: int, seed: int):
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    x = net.initial_state(noise(range(seed, seed + batch), shape).cuda(), 5.0)
    sigma = torch.linspace(4, 5, batch, dtype=torch.float64, device="cuda")
    return x, sigma, net.encode_prompts([f"a 3d emoji of cat {number}" for number in range(seed, seed + batch)])


@torch.no_grad()
def test_calls_are_compiled_and_replayed_when_asked_to(compiled):
    plain = create_model("emoji", guidance_rate=7.5, device="cuda", precision="float16")
    first, second = start_of(plain, 3, 0), start_of(plain, 3, 7)
    latents = first[0] / 5
    assert torch.equal(compiled.slope(*first), plain.slope(*first))  # nothing is compiled unasked
    assert torch.equal(compiled.decode(latents), plain.decode(latents))
    assert not compiled.guided.graphs
    compiled.compile_calls(True)
    slopes = [compiled.slope(*start) for start in (first, second)]
    pictures = [compiled.decode(part) for part in (latents, -latents)]
    assert len(compiled.guided.graphs) == len(compiled.decoder.graphs) == 1
    for slope, start in zip(slopes, (first, second), strict=True):  # the second replay has not touched the first's
        expected = plain.slope(*start)
        assert (slope - expected).norm() / expected.norm() < 0.01
    for picture, part in zip(pictures, (latents, -latents), strict=True):
        assert (picture - plain.decode(part)).abs().mean() * 127.5 < 0.2  # levels
    compiled.compile_calls(False)
    for start in (first, [part[:1] for part in first]):  # as it is, compiled before or not
        assert torch.equal(compiled.slope(*start), plain.slope(*start))
    assert len(compiled.guided.graphs) == 1


def test_gradients_go_past_the_graphs(compiled):
    x, sigma, cond = start_of(compiled, 3, 0)
    compiled.compile_calls(True)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled.slope(x, sigma, cond).square().sum(), x)
    assert gradient.norm() > 0
