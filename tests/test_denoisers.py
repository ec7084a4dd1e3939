"""The Stable Diffusion denoiser against formulas written out here and against diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from solvers import epd_sampler
from training.denoisers import EMBEDDED, ModelError, check_model, create_model
from training.denoisers.stable_diffusion import NoiseTable
from training.generate import initial_latents, table_schedule
from training.ppo.cold_start import cold_start_table

PROMPTS = ["a 3d emoji of bat on a red background", "a flat emoji of pie on a tan background"]


@pytest.fixture(scope="module")
def net():
    return create_model("emoji")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        EMBEDDED, dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True
    )


def sd_log_alpha() -> np.ndarray:
    """SD's table by numpy: 1000 betas, linear in their square root."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return 0.5 * np.log(np.cumprod(1 - betas))


def test_noise_table_at_and_between_its_nodes():
    table, log_alpha = NoiseTable(0.00085, 0.012, 1000), sd_log_alpha()
    nodes = (np.arange(1000) + 1) / 1000
    times = np.concatenate([nodes, (nodes[1:] + 3 * nodes[:-1]) / 4])
    expected = np.interp(times, nodes, log_alpha)
    sigma = table.sigma(torch.from_numpy(times)).numpy()
    np.testing.assert_allclose(sigma, np.sqrt(np.exp(-2 * expected) - 1), rtol=1e-11)
    np.testing.assert_allclose(table.sigma_inv(torch.from_numpy(sigma)).numpy(), times, rtol=0, atol=1e-11)


def test_noise_table_goes_on_straight_beyond_both_ends():
    table, log_alpha = NoiseTable(0.00085, 0.012, 1000), sd_log_alpha()
    below, above = 0.0004, 1.002
    first = log_alpha[0] + (below - 0.001) * (log_alpha[1] - log_alpha[0]) / 0.001
    last = log_alpha[-1] + (above - 1) * (log_alpha[-1] - log_alpha[-2]) / 0.001
    sigma = table.sigma(torch.tensor([below, above], dtype=torch.float64))
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(np.exp(-2 * np.array([first, last])) - 1), rtol=1e-10)
    np.testing.assert_allclose(table.sigma_inv(sigma).numpy(), [below, above], rtol=1e-9)


def test_sigma_range(net):
    assert net.sigma_max == pytest.approx(14.614641, abs=1e-6)  # the figure usually printed for SD v1.5
    assert net.sigma_min == 0.1
    assert (net.img_channels, net.img_resolution, net.is_flow) == (4, 16, False)


def test_slope_is_the_guided_epsilon_of_the_compvis_formula(net, pipeline):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 5
    cond = net.encode_prompts(PROMPTS)
    for sigma in (0.17, 2.5, 14.6):
        log_alpha, nodes = sd_log_alpha(), (np.arange(1000) + 1) / 1000
        t = np.interp(0.5 * np.log1p(sigma**2), -log_alpha, nodes)
        inputs = x / np.sqrt(sigma**2 + 1)
        index = torch.full((2,), 1000 * t - 1, dtype=torch.float32)
        with torch.no_grad():
            text, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
            conditional = pipeline.unet(inputs.float(), index, text).sample
            unconditional = pipeline.unet(inputs.float(), index, empty).sample
        expected = unconditional + 7.5 * (conditional - unconditional)
        got = net.slope(x, torch.tensor(sigma, dtype=torch.float64), cond)
        assert got.dtype == torch.float32
        assert (got - expected).norm() / expected.norm() < 1e-5


def test_one_sigma_per_row_equals_one_sigma_at_a_time(net):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    cond = net.encode_prompts(PROMPTS)
    sigmas = torch.tensor([0.4, 3.0], dtype=torch.float64)
    both = net.slope(x, sigmas, cond)
    for row in range(2):
        alone = net.slope(x[row : row + 1], sigmas[row], cond[row : row + 1])
        assert (both[row : row + 1] - alone).norm() / alone.norm() < 5e-6


def test_prompts_and_decoder_equal_the_pipeline(net, pipeline):
    prompts = [*PROMPTS, "", "a very long prompt " * 30]
    torch.testing.assert_close(net.encode_prompts(prompts).text, pipeline.encode_prompt(prompts, "cpu", 1, False)[0])
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(net.decode(latents), expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_cut_is_said_once(capsys):
    net = create_model("emoji")
    long = "a very long prompt about a bat " * 30
    capsys.readouterr()
    for _ in range(2):
        net.encode_prompts([PROMPTS[0], long, long, ""])
    (line,) = capsys.readouterr().err.splitlines()
    tokens = len(net.tokenizer(long).input_ids)
    assert line.startswith(f"note: a prompt of {tokens} tokens is cut to 24; the model reads no further than: ...")
    read = line.partition("...")[2]
    assert read in long  # the very words
    assert torch.equal(net.encode_prompts([long]).text, net.encode_prompts([long[: long.find(read) + len(read)]]).text)
    net.encode_prompts(["another " * 40])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "limit", "levels"), [(1.0, 2e-3, 0.05), (7.5, 0.04, 1.0)])
def test_half_precision_over_a_whole_trajectory(guidance, limit, levels):
    """EPD with 10 intervals: the latents' relative error and the pixels' mean error in 8-bit levels.

    Measured: 6e-4 and 0.03 unguided, 0.016 and 0.6 at guidance 7.5, which amplifies every rounding.
    """
    table = cold_start_table(11, 2)
    ends, pictures, kinds = [], [], set()
    for precision in ("float32", "float16"):
        net = create_model("emoji", guidance_rate=guidance, precision=precision)
        sigmas = table_schedule(table, net)
        x, cond = initial_latents(net, PROMPTS[:1] * 4, [0, 1, 2, 3], sigmas)
        ends.append(epd_sampler(net, x, sigmas, cond, table=table, callback=lambda i, x, sigma: kinds.add(x.dtype)))
        pictures.append(net.decode(ends[-1]))
    assert kinds == {torch.float32}
    assert 0 < (ends[1] - ends[0]).norm() / ends[0].norm() < limit
    assert (pictures[1] - pictures[0]).abs().mean() * 127.5 < levels


def test_guidance_one_runs_one_branch_and_counters_count_rows():
    unguided = create_model("emoji", guidance_rate=1)
    guided = create_model("emoji", guidance_rate=1.000001)
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    cond, sigma = unguided.encode_prompts([PROMPTS[0]] * 3), torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(unguided.slope(x, sigma, cond), guided.slope(x, sigma, cond), rtol=1e-3, atol=1e-4)
    assert (unguided.calls, unguided.rows, guided.calls, guided.rows) == (1, 3, 1, 3)


def test_half_precision_network_keeps_a_float32_slope(net):
    half = create_model("emoji", precision="bfloat16")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    sigma = torch.tensor(2.0, dtype=torch.float64)
    got = half.slope(x, sigma, half.encode_prompts(PROMPTS[:1]))
    expected = net.slope(x, sigma, net.encode_prompts(PROMPTS[:1]))
    assert got.dtype == torch.float32
    # Guidance 7.5 multiplies bfloat16's 3 digits; measured 0.03.
    assert 0 < (got - expected).norm() / expected.norm() < 0.1


def test_cond_repeats_sample_major(net):
    cond = net.encode_prompts(PROMPTS)
    repeated = cond.repeat_interleave(3)
    assert len(repeated) == 6
    assert torch.equal(repeated.text[1 * 3 + 2], cond.text[1])
    assert torch.equal(repeated[3:].text[0], cond.text[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "imagenet"}, "unknown dataset_name 'imagenet'; use one of emoji, ms_coco"),
        ({"dataset_name": "emoji", "guidance_type": "cg"}, "unknown guidance_type 'cg'"),
        ({"dataset_name": "emoji", "guidance_rate": -1.0}, "guidance_rate -1.0 must be"),
        ({"dataset_name": "emoji", "guidance_rate": float("nan")}, "guidance_rate nan must be"),
        ({"dataset_name": "emoji", "precision": "int8"}, "unknown precision 'int8'"),
        ({"dataset_name": "emoji", "model_path": "no/such/folder"}, "no/such/folder does not exist"),
        ({"dataset_name": "ms_coco", "model_path": ""}, "model folder . lacks scheduler"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ModelError) as caught:
        check_model(**arguments)
    assert message in str(caught.value)


def test_incomplete_or_foreign_folder(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    scheduler = folder / "scheduler/scheduler_config.json"
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(values | {"prediction_type": "v_prediction"}))
    with pytest.raises(ModelError, match="predicts v_prediction"):
        check_model("emoji", model_path=folder)
    scheduler.write_text("[]")
    with pytest.raises(ModelError, match="is not a scheduler configuration"):
        check_model("emoji", model_path=folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks unet/diffusion_pytorch_model"):
        check_model("emoji", model_path=folder)


def test_embedded_model_is_within_its_size():
    assert sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()) <= 36_000_000
