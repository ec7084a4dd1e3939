"""The pipeline, the scheduler and the table folders for diffusers: images of our own sampler, diffusers' protocols.

Small pictures (16 x 16) of the embedded model, in float64 wherever results are compared: guidance amplifies rounding.
"""

from __future__ import annotations

import copy
import hashlib
import http.server
import json
import math
import pickle
import re
import subprocess
import sys
import threading
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.image_processor import VaeImageProcessor
from launchers import NEEDS_A_GPU
from PIL import Image
from run_folders import only_run
from solver_runs import random_table
from toy_training import run_toy, write_files

from benchmarks.closed_form import MixtureDenoiser
from dnnlib.util import DownloadError
from solver_utils import SolverError
from torch_utils.errors import UserError
from training.denoisers import EMBEDDED, create_model
from training.denoisers.unet import BranchedUNet
from training.diffusers_plugin import EPDPipeline, EPDScheduler, EPDTable, apply_epd
from training.generate import SamplingPlan
from training.ppo.export_epd_predictor import export_predictor
from training.solver_table import ARRAYS, SolverTable
from training.table import TableError, load_table, save_table

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
SIZE = 16  # pixels
EXACT = 1e-9


def table_of(intervals=2, points=2, **metadata) -> SolverTable:
    numbers = random_table(intervals, points)
    arrays = {name: getattr(numbers, name) for name in ARRAYS}
    return SolverTable(**arrays, **{"dataset_name": "emoji", "schedule_type": "logsnr", **metadata})


TABLE = table_of()
KINDS = [
    {},
    {"afs": True},
    {"sampler_stu": "ipndm"},
    {"sampler_stu": "dpmpp", "afs": True, "max_order": 3},
    {"guidance_rate": 1.0, "schedule_type": "discrete", "sigma_min": 0.3},
]


def load(dtype) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        EMBEDDED, dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loaded():
    return load(torch.float64)


@pytest.fixture
def pipe(loaded):
    """A pipeline of its own, with networks that tests may not change."""
    return StableDiffusionPipeline(**loaded.components, requires_safety_checker=False)


@pytest.fixture
def own(loaded):
    """One with a UNet that tests may change."""
    return StableDiffusionPipeline(
        **{**loaded.components, "unet": copy.deepcopy(loaded.unet)}, requires_safety_checker=False
    )


@pytest.fixture(scope="module")
def net():
    """Our own denoiser in float64."""
    net = create_model("emoji")
    net.dtype = torch.float64
    net.text_encoder.double()
    net.empty_text = net._embed([""])
    net.unet = BranchedUNet(load(torch.float64).unet)
    return net


def noise(rows=1, dtype=torch.float64):
    side = SIZE // 4
    return torch.randn(rows, 4, side, side, dtype=dtype, generator=torch.Generator().manual_seed(5))


def latents_of(pipe, prompt="a cat", **options):
    pipe.set_progress_bar_config(disable=True)
    rows = len(prompt) if isinstance(prompt, list) else 1
    size = {"latents": noise(rows)} if "generator" not in options else {"height": SIZE, "width": SIZE}
    return pipe(prompt, output_type="latent", **{"height": SIZE, "width": SIZE, **size, **options}).images


def rows_seen(unet):
    """A list that gets the number of rows of every call of `unet`."""
    rows = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def with_scheduler(pipe, table):
    scheduler = EPDScheduler.from_table(table, pipe.scheduler.config)
    return StableDiffusionPipeline(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)


# ----------------------------------------------------------------------------
# The pipeline.


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_latents_are_those_of_our_own_sampler(pipe, net, kind):
    table, prompts = table_of(**kind), ["a cat", "a red car"]
    net.guidance_rate = table.guidance_rate
    plan = SamplingPlan.of_table(table, None, "float32")
    sigmas = plan.sigmas(net)
    with torch.no_grad():
        x, cond = net.initial_state(noise(2), sigmas[0]), net.encode_prompts(prompts)
        expected = plan.sampler([0, 1])(net, x, sigmas, cond)
    epd = apply_epd(pipe, table)
    found = latents_of(epd, prompts)
    assert (found - expected).abs().max() < EXACT
    one_by_one = latents_of(
        with_scheduler(pipe, table), prompts, num_inference_steps=2, guidance_scale=table.guidance_rate
    )
    assert (one_by_one - found).abs().max() < EXACT


def test_images_agree_in_float32():
    """Of `sample.py`'s denoiser, the pipeline and the scheduler, in [0, 1]; guidance would magnify rounding errors."""
    pipe, net = load(torch.float32), create_model("emoji", guidance_rate=1.0)
    table = table_of(3, guidance_rate=1.0)
    plan = SamplingPlan.of_table(table, None, "float32")
    sigmas, start = plan.sigmas(net), noise(1, torch.float32)
    with torch.no_grad():
        x = plan.sampler([0])(net, net.initial_state(start, sigmas[0]), sigmas, net.encode_prompts(["a cat"]))
        expected = (net.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    epd, stepwise = apply_epd(pipe, table), with_scheduler(pipe, table)
    epd.set_progress_bar_config(disable=True)
    stepwise.set_progress_bar_config(disable=True)
    image = epd("a cat", latents=start, output_type="np").images
    other = stepwise("a cat", latents=start, output_type="np", num_inference_steps=3, guidance_scale=1.0).images
    assert image.shape == (1, SIZE, SIZE, 3) and image.dtype == np.float32
    assert np.abs(image - expected).max() < 1e-5
    assert np.abs(image - other).max() < 1e-5


@pytest.mark.parametrize("afs", [False, True])
def test_half_precision(afs):
    """Networks in float16, the state in between in float32 (the scheduler's samples are rounded after every step)."""
    pipe, table = load(torch.float16), table_of(guidance_rate=1.0, afs=afs)
    start = noise().half()
    expected = latents_of(apply_epd(load(torch.float64), table), latents=start.double())
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": start}
    for made in (apply_epd(pipe, table), with_scheduler(pipe, table)):
        found = latents_of(made, **options)
        assert found.dtype == torch.float16 and (found - expected).abs().max() < 0.1
    (picture,) = apply_epd(pipe, table)("a cat", height=SIZE, width=SIZE).images
    assert picture.size == (SIZE, SIZE)


def test_prompts_and_negative_prompts_belong_to_their_rows(pipe):
    epd, start = apply_epd(pipe, TABLE), noise(2)
    prompts, negatives = ["a cat", "a red car"], ["blue", "a dog"]
    together = latents_of(epd, prompts, latents=start, negative_prompt=negatives)
    for row in range(2):
        alone = latents_of(epd, prompts[row], latents=start[row : row + 1], negative_prompt=negatives[row])
        assert (together[row] - alone[0]).abs().max() < EXACT
    assert (together - latents_of(epd, prompts, latents=start)).abs().max() > 0.01
    embeds = epd.encode_prompt("a cat", "cpu", 1, True, "blue")
    given = latents_of(epd, None, latents=start[:1], prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    assert (given[0] - together[0]).abs().max() < EXACT


def test_points_go_through_the_network_in_one_batch(own):
    epd = apply_epd(own, table_of(2, 3))
    rows = rows_seen(own.unet)
    whole = latents_of(epd, ["a cat", "a car"])
    assert rows == [4, 12, 4, 12]
    rows.clear()
    unguided = latents_of(epd, guidance_scale=1.0)
    assert rows == [1, 3, 1, 3]
    rows.clear()
    latents_of(epd, guidance_scale=0.0)  # none, as in diffusers' pipelines
    assert rows == [1, 3, 1, 3]
    assert (unguided - whole[:1]).abs().max() > 0.01
    rows.clear()
    parts = latents_of(apply_epd(own, table_of(2, 3), max_rows=2), ["a cat", "a car"])
    assert rows == [4, 4, 4, 4] * 2 and (parts - whole).abs().max() < EXACT


def test_guidance_is_the_tables_unless_given(pipe):
    epd = apply_epd(pipe, table_of(guidance_rate=3.0))
    assert torch.equal(latents_of(epd), latents_of(epd, guidance_scale=3.0))
    assert (latents_of(epd) - latents_of(epd, guidance_scale=7.5)).abs().max() > 0.01
    epd = apply_epd(pipe, table_of(guidance_rate=0.5))
    with pytest.raises(SolverError, match=r"guidance 0\.5, below 1"):
        latents_of(epd)
    assert latents_of(epd, guidance_scale=2.0).isfinite().all()


def test_guidance_rescale_is_that_of_diffusers(pipe):
    found = latents_of(apply_epd(pipe, TABLE), guidance_rescale=0.7)
    expected = latents_of(with_scheduler(pipe, TABLE), num_inference_steps=2, guidance_rescale=0.7)
    assert (found - expected).abs().max() < EXACT
    assert (found - latents_of(apply_epd(pipe, TABLE))).abs().max() > 1e-3


def test_velocity_is_read_as_by_the_scheduler(own):
    own.scheduler = DDIMScheduler.from_config(own.scheduler.config, prediction_type="v_prediction", clip_sample=False)
    found = latents_of(apply_epd(own, TABLE))
    expected = latents_of(with_scheduler(own, TABLE), num_inference_steps=2)
    assert apply_epd(own, TABLE).scheduler.noise.predicts == "v_prediction"
    assert (found - expected).abs().max() < EXACT


def test_generators_and_images_per_prompt(pipe):
    epd = apply_epd(pipe, TABLE)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    four = latents_of(epd, ["a cat", "a car"], num_images_per_prompt=2, generator=generators)
    for row, prompt in enumerate(["a cat", "a cat", "a car", "a car"]):
        alone = latents_of(epd, prompt, generator=torch.Generator().manual_seed(row))
        assert (four[row] - alone[0]).abs().max() < EXACT
    with pytest.raises(ValueError, match="list of generators"):
        latents_of(epd, "a cat", generator=generators)


def test_output_types(pipe):
    epd = apply_epd(pipe, TABLE)
    epd.set_progress_bar_config(disable=True)
    start = noise()
    latent = epd("a cat", latents=start, output_type="latent").images
    array = epd("a cat", latents=start, output_type="np").images
    tensor, flagged = epd("a cat", latents=start, output_type="pt", return_dict=False)
    (picture,) = epd("a cat", latents=start).images
    assert flagged is None and isinstance(picture, Image.Image) and picture.size == (SIZE, SIZE)
    decoded = epd.vae.decode(latent / epd.vae.config.scaling_factor).sample.detach()
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert (tensor - expected).abs().max() < EXACT
    assert np.abs(array[0] - expected[0].permute(1, 2, 0).numpy()).max() < 1e-6
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() < 1 / 254
    assert epd("a cat").images[0].size == (64, 64)  # the model's own size


def test_callback_is_called_once_per_interval_and_may_change_latents(pipe):
    epd, seen = apply_epd(pipe, table_of(3)), []

    def watch(called, i, t, tensors):
        seen.append((called, i, float(t), tensors["latents"]))
        return {}

    plain = latents_of(epd, callback_on_step_end=watch)
    assert [(called is epd, i) for called, i, _, _ in seen] == [(True, 0), (True, 1), (True, 2)]
    assert epd.num_timesteps == 3
    assert torch.equal(seen[-1][3], plain)
    times = epd.scheduler.timesteps[:: epd.scheduler.order]
    assert torch.equal(torch.tensor([t for _, _, t, _ in seen]), times)

    # Replacing the state at a node by what another run had there goes on as that run.
    other = latents_of(epd, "a dog", latents=noise() + 1)
    middle = []
    latents_of(epd, "a dog", latents=noise() + 1, callback_on_step_end=lambda p, i, t, k: middle.append(k["latents"]))

    def put(called, i, t, tensors):
        return {"latents": middle[0]} if i == 0 else {}

    assert torch.equal(latents_of(epd, "a dog", callback_on_step_end=put), other)


@pytest.mark.parametrize("kind", [{}, {"sampler_stu": "ipndm"}], ids=str)
def test_interrupt_stops_after_the_interval(own, kind):
    epd, states = apply_epd(own, table_of(3, **kind)), []
    rows = rows_seen(own.unet)

    def stop(called, i, t, tensors):
        states.append(tensors["latents"])
        called._interrupt = i == 1
        return tensors

    assert torch.equal(latents_of(epd, callback_on_step_end=stop), states[1])
    assert len(states) == 2 and len(rows) == 4
    rows.clear()
    latents_of(epd)  # the next call is not interrupted
    assert len(rows) == 6


def test_callbacks_of_diffusers_can_end_the_guidance(own):
    epd = apply_epd(own, table_of(3))
    rows = rows_seen(own.unet)
    latents_of(epd, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    assert rows == [2, 4, 2, 4, 1, 2]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        latents_of(epd, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["noise"])


def test_components_are_shared_and_the_given_pipeline_stays_as_it_is(own):
    own.set_progress_bar_config(disable=True)
    before = dict(own.config)
    epd = apply_epd(own, TABLE)
    assert isinstance(epd, StableDiffusionPipeline) and epd.max_rows is None
    assert all(epd.components[name] is part for name, part in own.components.items() if name != "scheduler")
    assert dict(own.config) == before and type(own.scheduler).__name__ == "PNDMScheduler"
    assert "set_alpha_to_one" in epd.scheduler.config  # so that another scheduler can be made of it again
    again = apply_epd(epd, table_of(3))
    assert again.scheduler.num_inference_steps == 3 and epd.scheduler.num_inference_steps == 2
    plain = latents_of(epd)
    with torch.no_grad():
        own.unet.conv_out.weight.mul_(1.1)  # as fused LoRA weights do
    assert (latents_of(epd) - plain).abs().max() > 0.01


def test_slicing_changes_no_image(own):
    epd = apply_epd(own, TABLE)
    plain = latents_of(epd, ["a cat", "a car"])
    own.enable_attention_slicing()
    assert (latents_of(epd, ["a cat", "a car"]) - plain).abs().max() < EXACT
    pictures = epd(["a cat", "a car"], latents=noise(2), output_type="pt").images
    epd.vae.enable_slicing()
    sliced = epd(["a cat", "a car"], latents=noise(2), output_type="pt").images
    epd.vae.disable_slicing()
    assert (pictures - sliced).abs().max() < EXACT


def test_lora(own, tmp_path):
    import peft

    adapter = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_v"], init_lora_weights=False)
    trained = copy.deepcopy(own.unet)
    trained.add_adapter(adapter)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(trained))
    own.text_encoder = copy.deepcopy(own.text_encoder)
    epd = apply_epd(own, TABLE)
    plain = latents_of(epd)
    epd.load_lora_weights(tmp_path)
    epd.unet.double()
    with_lora = latents_of(epd)
    assert (with_lora - plain).abs().max() > 0.01
    expected = latents_of(with_scheduler(own, TABLE), num_inference_steps=2)
    assert (with_lora - expected).abs().max() < EXACT
    epd.fuse_lora()
    assert (latents_of(epd) - with_lora).abs().max() < 1e-6
    epd.unfuse_lora()

    epd.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    epd.text_encoder.double()
    assert (latents_of(epd) - with_lora).abs().max() > 0.01
    none = latents_of(epd, cross_attention_kwargs={"scale": 0.0})  # of both networks' adapters
    assert (none - plain).abs().max() < 1e-6


@pytest.mark.parametrize("before", [True, False], ids=["then apply_epd", "on its result"])
def test_cpu_offload_puts_its_hooks_on(own, before):
    """On the CPU in place of a GPU: the same hooks, with nothing to move."""
    plain = latents_of(apply_epd(own, TABLE))
    if before:
        own.enable_model_cpu_offload(device="cpu")
    epd = apply_epd(own, TABLE)
    if not before:
        epd.enable_model_cpu_offload(device="cpu")
    moved = []
    for name in ("text_encoder", "unet", "vae"):
        epd.components[name]._hf_hook.init_hook = lambda module, name=name: moved.append(name) or module
    hooks = list(epd._all_hooks)
    assert torch.equal(latents_of(epd), plain)
    assert len(epd._all_hooks) == 3 and not set(map(id, hooks)) & set(map(id, epd._all_hooks))  # put on anew
    epd.remove_all_hooks()


@NEEDS_A_GPU
@pytest.mark.parametrize("offload", [EPDPipeline.enable_model_cpu_offload, EPDPipeline.enable_sequential_cpu_offload])
def test_cpu_offload_on_a_gpu(own, offload):
    """Components come to the GPU for their turn, and are back when the images are there."""
    own.to("cuda")
    plain = latents_of(apply_epd(own, TABLE)).cpu()
    own.to("cpu")
    epd = apply_epd(own, TABLE)
    offload(epd)
    found = latents_of(epd)
    assert found.device.type == "cuda"
    assert (found.cpu() - plain).abs().max() < 1e-3 * plain.abs().max()
    epd.maybe_free_model_hooks()
    assert {parameter.device.type for parameter in epd.unet.parameters()} <= {"cpu", "meta"}
    epd.remove_all_hooks()
    assert {parameter.device.type for parameter in epd.text_encoder.parameters()} == {"cpu"}


def test_safety_checker(pipe):
    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float64

        def forward(self, images, clip_input):
            images[0] = 0
            return images, [True, False]

    class Extractor:
        def __call__(self, images, return_tensors):
            assert all(isinstance(image, Image.Image) for image in images)
            features = torch.zeros(len(images), 3, 8, 8)
            features_of = type("Features", (dict,), {"to": lambda self, device: self, "pixel_values": features})
            return features_of()

    epd = apply_epd(pipe, TABLE)
    pipe.safety_checker = pipe.feature_extractor = None
    epd.safety_checker, epd.feature_extractor = Checker(), Extractor()
    epd.image_processor = VaeImageProcessor(vae_scale_factor=4)
    epd.set_progress_bar_config(disable=True)
    result = epd(["a cat", "a car"], latents=noise(2), output_type="pt")
    assert result.nsfw_content_detected == [True, False]
    assert (result.images[0] == 0).all() and result.images[1].std() > 0.01  # the first is black, not grey


def test_the_whole_pipeline_can_be_saved_and_loaded(pipe, tmp_path):
    epd = apply_epd(pipe, TABLE)
    epd.save_pretrained(tmp_path)
    back = EPDPipeline.from_pretrained(tmp_path, dtype=torch.float64, local_files_only=True, low_cpu_mem_usage=False)
    assert back.scheduler.solver_table.sha256() == TABLE.sha256()
    assert torch.equal(latents_of(back), latents_of(epd))


def other_pipeline(kind):
    """One without networks, to be refused by its type."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: other_pipeline(StableDiffusionXLPipeline), "not StableDiffusionXLPipeline"),
        (lambda pipe: other_pipeline(StableDiffusionImg2ImgPipeline), "not StableDiffusionImg2ImgPipeline"),
        (lambda pipe: pipe.scheduler.register_to_config(beta_schedule="linear"), "noise schedule 'linear'"),
        (lambda pipe: pipe.scheduler.register_to_config(prediction_type="sample"), "predicts 'sample'"),
        (lambda pipe: pipe.scheduler.register_to_config(trained_betas=[0.1, 0.2]), "trained_betas"),
        (lambda pipe: pipe.scheduler.register_to_config(beta_end=2.0), "no usable noise table"),
        (lambda pipe: pipe.unet.register_to_config(time_cond_proj_dim=256), "time_cond_proj_dim"),
    ],
)
def test_other_models_are_refused_in_one_line(own, change, message):
    own.scheduler = copy.deepcopy(own.scheduler)
    changed = change(own)
    with pytest.raises(UserError, match=message) as caught:
        apply_epd(changed or own, TABLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda: table_of(schedule_type="flowmatch", sigma_max=0.9), "flow models"),
        (lambda: table_of(schedule_type="nothing"), "unknown schedule type"),
        (lambda: table_of(sigma_max=80.0), "beyond the model's noise levels"),
        (lambda: table_of(guidance_type="classifier"), "guidance 'classifier'"),
        (lambda: SolverTable(torch.full((2, 2, 1), 0.5), torch.ones(2, 2, 1)), "one table, not 2"),
        (lambda: "no/such/folder", "no file or folder here"),
        (lambda: "table.safetensors", "no such file"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_one_line(pipe, table, message):
    with pytest.raises(UserError, match=message) as caught:
        apply_epd(pipe, table())
    assert "\n" not in str(caught.value)


def test_wrong_calls(pipe):
    epd = apply_epd(pipe, TABLE)
    with pytest.raises(SolverError, match="num_inference_steps=2, not 50"):
        latents_of(epd, num_inference_steps=50)
    with pytest.raises(SolverError, match="max_rows must be at least 1"):
        apply_epd(pipe, TABLE, max_rows=0)
    with pytest.raises(TypeError, match="ip_adapter_image"):
        epd("a cat", ip_adapter_image=Image.new("RGB", (8, 8)))
    epd.scheduler = DDIMScheduler.from_config(epd.scheduler.config)
    with pytest.raises(UserError, match="the scheduler is a DDIMScheduler"):
        latents_of(epd)


# ----------------------------------------------------------------------------
# The scheduler.


class Network(MixtureDenoiser):
    """The closed form as what a diffusers network computes: of a scaled sample and a timestep, epsilon or v."""

    def __init__(self, predicts="epsilon"):
        super().__init__()
        self.predicts = predicts

    def __call__(self, scaled, timestep, scheduler):
        sigma = scheduler.noise.level(timestep)
        x = scaled * (sigma**2 + 1).sqrt()
        epsilon = self.slope(x, sigma)
        data = x - sigma * epsilon
        return epsilon if self.predicts == "epsilon" else (epsilon - sigma * data) / (sigma**2 + 1).sqrt()


def walk(scheduler, network, sample, timesteps=None):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = network(scheduler.scale_model_input(sample, t), t, scheduler)
        sample = scheduler.step(output, t, sample).prev_sample
    return sample


def whole(scheduler, x, first=0):
    """The same by the solver at once."""
    steps, net = scheduler.steps(x, first), Network()
    for i in range(len(scheduler.nodes) - 1 - first):
        x = steps.step(net, i, x)
    return x


@pytest.fixture
def start():
    return Network().start(2, 14.6)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scheduler_steps_are_the_solvers(kind, predicts, start):
    scheduler = EPDScheduler.from_table(table_of(4, 3, **kind), {"prediction_type": predicts})
    result = walk(scheduler, Network(predicts), start)
    # Timesteps are float32 here, as diffusers' are, and noise levels read off them are so, too.
    assert (result - whole(scheduler, start)).abs().max() < 1e-5 and result.dtype == torch.float64


def test_states_in_half_precision_are_walked_in_float32(start):
    dtypes = []

    class Watched(Network):
        def slope(self, x, sigma, cond=None):
            dtypes.append(x.dtype)
            return super().slope(x, sigma, cond)

    steps = EPDScheduler.from_table(TABLE).steps(start.half())
    assert steps.step(Watched(), 0, start.half()).dtype == torch.float32
    assert dtypes == [torch.float32, torch.float32]


def test_scheduler_protocol(start):
    scheduler = EPDScheduler.from_table(table_of(4, 3))
    assert scheduler.order == 4 and len(scheduler) == 1000 and scheduler.step_index is None
    assert scheduler.timesteps.shape == (16,) and scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.shape == (17,) and scheduler.num_inference_steps == 4
    assert scheduler.init_noise_sigma == scheduler.nodes[0] == pytest.approx(14.6146, abs=1e-3)
    assert float(scheduler.timesteps[0]) == pytest.approx(999, abs=1e-3) and (scheduler.timesteps < 1000).all()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        index = scheduler.index_for_timestep(t)
        assert scheduler.sigmas[index] == sigma
    first = scheduler.timesteps[0]
    scaled = scheduler.scale_model_input(start, first)
    assert (scaled - start / math.sqrt(1 + scheduler.init_noise_sigma**2)).abs().max() < 1e-12
    slope = torch.ones_like(start)
    output = scheduler.step(slope, first, start)
    assert scheduler.step_index == 1 and output.prev_sample.shape == start.shape
    assert (output.pred_original_sample - (start - scheduler.init_noise_sigma)).abs().max() < 1e-12
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    pair = scheduler.step(slope, first, start, return_dict=False)
    assert isinstance(pair, tuple) and torch.equal(pair[0], output.prev_sample)
    assert torch.equal(pair[1], output.pred_original_sample)
    half = scheduler.step(slope.half(), scheduler.timesteps[1], start.half())
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == torch.float16
    assert scheduler.scale_model_input(start.half(), 0).dtype == torch.float16
    assert scheduler.set_timesteps(device="cpu") is None and scheduler.timesteps.device.type == "cpu"


def test_scheduler_runs_again_and_can_be_copied(start):
    scheduler = EPDScheduler.from_table(table_of(sampler_stu="ipndm"))
    first = walk(scheduler, Network(), start)
    with pytest.raises(SolverError, match="all 6 evaluations are done"):
        scheduler.step(start, 0, start)
    scheduler.set_timesteps(2)
    assert torch.equal(walk(scheduler, Network(), start), first)
    scheduler.set_timesteps(2)
    for made in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(walk(made, Network(), start), first)


@pytest.mark.parametrize("kind", [{}, {"sampler_stu": "ipndm"}, {"sampler_stu": "dpmpp", "max_order": 3}], ids=str)
@pytest.mark.parametrize("announced", [True, False])
def test_scheduler_begins_at_a_later_interval(kind, announced, start):
    """As image-to-image pipelines do, which announce it or not."""
    scheduler = EPDScheduler.from_table(table_of(4, 2, **kind))
    x = start * scheduler.nodes[1] / scheduler.nodes[0]
    timesteps = scheduler.timesteps[scheduler.order :]
    if announced:
        scheduler.set_begin_index(scheduler.order)
        assert scheduler.begin_index == 3
    result = walk(scheduler, Network(), x, timesteps)
    assert (result - whole(scheduler, x, 1)).abs().max() < 1e-5


def test_scheduler_refuses_to_begin_between_nodes(start):
    scheduler = EPDScheduler.from_table(table_of(4, 2))
    with pytest.raises(SolverError, match="first of the 3 evaluations of an interval, not at evaluation 4"):
        scheduler.scale_model_input(start, scheduler.timesteps[4])
    with pytest.raises(SolverError, match=r"no evaluation at timestep 7\.5"):
        scheduler.step(start, 7.5, start)
    scheduler = EPDScheduler.from_table(table_of(4, 2, afs=True))
    scheduler.set_begin_index(scheduler.order)
    with pytest.raises(SolverError, match="tables with AFS"):
        scheduler.step(start, scheduler.timesteps[3], start)
    with pytest.raises(SolverError, match="num_inference_steps=4, not 20"):
        scheduler.set_timesteps(20)


@pytest.mark.parametrize("afs", [False, True])
def test_add_noise(afs):
    scheduler = EPDScheduler.from_table(table_of(4, 2, afs=afs))
    data, epsilon = torch.zeros(2, 4, 3, 3, dtype=torch.float64), torch.ones(2, 4, 3, 3, dtype=torch.float64)
    nodes = scheduler.order * torch.arange(1, 4) - int(afs)
    for index, node in zip([0, *nodes.tolist()], scheduler.nodes, strict=False):
        noisy = scheduler.add_noise(data, epsilon, scheduler.timesteps[index][None])
        assert (noisy / node - 1).abs().max() < 1e-5
    each = scheduler.add_noise(data.half(), epsilon.half(), scheduler.timesteps[nodes[:2]])
    assert each.dtype == torch.float16 and each.shape == data.shape
    assert (each[:, 0, 0, 0] / scheduler.nodes[1:3] - 1).abs().max() < 1e-3
    table = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table.set_timesteps(1000)
    for t in (10, 500):  # any timestep of the model
        expected = table.add_noise(data, epsilon, torch.tensor([float(t)]))
        assert (scheduler.add_noise(data, epsilon, torch.tensor([t])) / expected - 1).abs().max() < 1e-4


def test_image_to_image_pipelines_take_the_scheduler(pipe):
    scheduler = EPDScheduler.from_table(table_of(4), pipe.scheduler.config)
    parts = {**pipe.components, "scheduler": scheduler}
    pictures = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pictures.set_progress_bar_config(disable=True)
    calls = []
    image = torch.full((1, 3, SIZE, SIZE), 0.5, dtype=torch.float64)
    result = pictures(
        "a cat",
        image,
        strength=0.5,
        num_inference_steps=4,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda p, i, t, k: calls.append(i) or {},
    ).images
    assert len(calls) == 6 and result.isfinite().all() and result.abs().max() < 10


def test_scheduler_configuration_round_trip(tmp_path, start):
    table = table_of(3, sampler_stu="dpmpp", afs=True)
    scheduler = EPDScheduler.from_table(table, DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.011).config)
    assert scheduler.config.beta_end == 0.011 and scheduler.config.beta_start == 0.0001  # DDIM's default
    scheduler.save_config(tmp_path / "a")
    scheduler.save_pretrained(tmp_path / "b")
    text = (tmp_path / "a/scheduler_config.json").read_text()
    assert json.loads(text)["_class_name"] == "EPDScheduler"
    expected = walk(scheduler, Network(), start)
    for made in (
        EPDScheduler.from_pretrained(tmp_path / "a"),
        EPDScheduler.from_pretrained(tmp_path, subfolder="b"),
        EPDScheduler.from_config(scheduler.config),
        EPDScheduler.from_config(json.loads(text)),
    ):
        assert made.solver_table.sha256() == table.sha256()
        assert torch.equal(walk(made, Network(), start), expected)
    assert DDIMScheduler in scheduler.compatibles and EulerDiscreteScheduler in scheduler.compatibles
    back = DDIMScheduler.from_config(scheduler.config)
    assert back.config.beta_end == 0.011 and back.config.set_alpha_to_one


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"table": None}, "needs a solver table"),
        ({"table": [1]}, "needs a solver table"),
        ({"table": {"positions": [[0.5]]}}, "weights is missing"),
        ({"table": {**TABLE.to_dict(), "weights": [[2.0, 1.0]] * 2}}, "sum to 1"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"num_train_timesteps": "many"}, "no usable noise table"),
    ],
)
def test_scheduler_configurations_are_checked(entries, message, tmp_path):
    EPDScheduler.from_table(TABLE).save_config(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(UserError, match=message):
        EPDScheduler.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------
# Tables as folders and on the hub.

MADE = EPDTable(TABLE, "me/model@v1", {"algorithm": "pathwise", "steps": 40})


def test_folder_round_trip(tmp_path, pipe):
    MADE.save_pretrained(tmp_path / "t")
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "README.md",
        "config.json",
        "epd_table.safetensors",
    ]
    back = EPDTable.from_pretrained(tmp_path / "t")
    assert (back.base_model, back.training) == (MADE.base_model, MADE.training)
    assert back.table.sha256() == TABLE.sha256()
    assert all(torch.equal(getattr(back.table, name), getattr(TABLE, name)) for name in ARRAYS)
    config = json.loads((tmp_path / "t/config.json").read_text())
    assert config["sha256"] == hashlib.sha256((tmp_path / "t/epd_table.safetensors").read_bytes()).hexdigest()
    assert (config["nfe"], config["parallel_nfe"], config["forwards"]) == (6, 4, 12)
    assert config["table"] == TABLE.metadata() and config["table_sha256"] == TABLE.sha256()
    expected = latents_of(apply_epd(pipe, TABLE))
    for source in (tmp_path / "t", str(tmp_path / "t"), tmp_path / "t/epd_table.safetensors", back):
        assert torch.equal(latents_of(apply_epd(pipe, source)), expected)


def test_card(tmp_path):
    yaml = pytest.importorskip("yaml")
    MADE.save_pretrained(tmp_path, "me/table")
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "diffusers" and values["base_model"] == "me/model" and "epd" in values["tags"]
    assert "4 sequential network calls and 6 evaluations" in text and "- algorithm: `pathwise`" in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'apply_epd(pipe, "me/table")' in example
    compile(example, "README.md", "exec")
    assert len(re.findall(r"^\| \d+ \|", text, re.MULTILINE)) == 2
    EPDTable(TABLE).save_pretrained(tmp_path)
    assert "Not recorded." in (tmp_path / "README.md").read_text()


def test_other_files(tmp_path):
    plain = replace(table_of(dataset_name="ms_coco"), scale_dir=None, scale_time=None)
    for name in ("table.json", "table.pkl", "table.safetensors"):
        save_table(plain, tmp_path / name)
        read = EPDTable.from_pretrained(tmp_path / name)
        assert torch.allclose(read.table.positions, plain.positions, atol=1e-6)
        assert read.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5" and read.training == {}
    assert EPDTable.of(TABLE).base_model is None  # the embedded model is on no hub


def test_runs_folder(tmp_path):
    run_toy(write_files(tmp_path), "never", [])
    run = only_run(tmp_path).path
    with pytest.raises(TableError, match="export the run"):
        EPDTable.from_pretrained(run)
    snapshot = export_predictor(run)
    exported = load_table(snapshot.with_suffix(".safetensors"))
    for folder in (run, run / "export"):
        found = EPDTable.from_pretrained(folder)
        assert found.table.sha256() == exported.sha256()
        assert found.training["algorithm"] == "rdpo" and found.training["steps"] == 4
    found.save_pretrained(tmp_path / "published")
    text = "".join(path.read_text() for path in (tmp_path / "published").iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path) not in text  # nothing of the machine it ran on
    save_table(TABLE, snapshot.with_suffix(".safetensors"))
    with pytest.raises(TableError, match="of another table"):
        EPDTable.from_pretrained(run)


def damage(folder: Path, name: str, **entries) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **entries}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: (t / "config.json").unlink(), "config.json cannot be used"),
        (lambda t: (t / "config.json").write_text("[]"), "no JSON object"),
        (lambda t: (t / "config.json").write_text("{" * 9), "cannot be used"),
        (lambda t: damage(t, "config.json", format="epd-table-9"), 'no "format": "epd-table-1"'),
        (lambda t: damage(t, "config.json", base_model="a b"), "base_model"),
        (lambda t: damage(t, "config.json", training={"a": ["b"]}), "flat JSON object"),
        (lambda t: damage(t, "config.json", sha256="0" * 64), "names another"),
        (lambda t: save_table(table_of(3), t / "epd_table.safetensors"), "names another"),
        (lambda t: (t / "epd_table.safetensors").unlink(), "no such file"),
        (lambda t: (t / "epd_table.safetensors").write_bytes(b"\x80\x04."), r"not a valid \.safetensors"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(spoil, message, tmp_path):
    MADE.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        EPDTable.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_and_places_that_will_not_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="it has no revision 'v1'"):
        EPDTable.from_pretrained(tmp_path, revision="v1")
    with pytest.raises(TableError, match="another revision than 'v2'"):
        EPDTable.from_pretrained("me/table@v1", revision="v2")
    with pytest.raises(TableError, match="holds neither"):
        EPDTable.from_pretrained(tmp_path)
    for name, words in (("file", "unknown table format"), ("none", "no file or folder here")):
        with pytest.raises(TableError, match=words):
            EPDTable.from_pretrained(tmp_path / name)
    with pytest.raises(TableError, match="cannot be written"):
        MADE.save_pretrained(tmp_path / "file")
    for name in ("table", "me/table@v1", "../x"):
        with pytest.raises(TableError, match="is not owner/name"):
            MADE.push_to_hub(name)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids downloads"):
        EPDTable.from_pretrained("me/table")


class Hub(http.server.BaseHTTPRequestHandler):
    """A small hub: `server.commits` are the repository me/table's, counted from 1, and `server.others` by their hash;
    `server.moves` is committed once the first configuration was read; `server.private`: whether a token is needed."""

    protocol_version = "HTTP/1.1"

    def answer(self, status=200, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self):
        return not self.server.private or self.headers.get("Authorization") == "Bearer hf_secret"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer(data=b'{"errors": [], "warnings": []}')
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(401, b'{"error": "who are you?"}')
        if self.path == "/api/repos/create":
            self.server.private = json.loads(body)["visibility"] == "private"
            out = {"url": f"http://127.0.0.1:{self.server.server_port}/me/table"}
        elif self.path == "/api/models/me/table/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            out = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        else:
            assert self.path == "/api/models/me/table/commit/main"
            files = [json.loads(line) for line in body.splitlines()]
            kept = {f["value"]["path"]: b64decode(f["value"]["content"]) for f in files if f["key"] == "file"}
            self.server.commits.append(kept)
            oid = f"{len(self.server.commits):040x}"
            out = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/me/table/commit/{oid}"}
        self.answer(data=json.dumps(out).encode())

    def do_GET(self):
        match = re.fullmatch(r"/me/table/resolve/([^/]+)/(.+)", self.path)
        if not match or not self.allowed():
            return self.answer(404)
        revision, name = match.groups()
        number = {"main": len(self.server.commits), "v1": 1}.get(revision) or int(revision, 16)
        data = (self.server.others.get(revision) or self.server.commits[number - 1]).get(name)
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append((revision, name))
            if self.server.moves and name == "config.json":  # somebody else uploads in this moment
                self.server.commits.append(self.server.moves.pop())
        self.answer(data=data, X_Repo_Commit=f"{number:040x}", ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.commits, server.others, server.moves = [], {}, []
    server.fetched, server.private = [], False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
from torch_utils.errors import UserError
from training.table_hub import EPDTable

def tell(call):
    try:
        print(call())
    except UserError as error:
        print(f"{type(error).__name__}: {error}")

"""


def in_a_process(hub, tmp_path, code, offline=False):
    """Lines that `code` prints, in a process of its own, because huggingface_hub reads its settings when imported."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-c", PROGRAM + code]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


EVIL = b"cos\nsystem\n(S'touch marker'\ntR."
TOO_LARGE = f"{18:040x}"
WRONG = {  # commit -> files unlike those of a good one, and what is said of it
    f"{16:040x}": ({"epd_table.safetensors": EVIL}, "not a valid .safetensors"),
    f"{17:040x}": ({"config.json": EVIL}, "config.json cannot be used"),
    TOO_LARGE: ({"epd_table.safetensors": bytes(17 << 20)}, "far more than a table needs"),
    f"{19:040x}": ({"config.json": None}, "cannot fetch config.json"),
}


def test_tables_go_to_the_hub_and_come_back(hub, tmp_path):
    for name, table in (("a", TABLE), ("b", table_of(3))):
        EPDTable(table, None, {"steps": 40}).save_pretrained(tmp_path / name)
    good = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for commit, (changed, _) in WRONG.items():
        hub.others[commit] = {name: data for name, data in {**good, **changed}.items() if data is not None}
    hub.moves.append(good)
    lines = in_a_process(
        hub,
        tmp_path,
        "tell(lambda: EPDTable.from_pretrained('a').push_to_hub('me/table', private=True, token='hf_wrong'))\n"
        "tell(lambda: EPDTable.from_pretrained('a').push_to_hub('me/table', private=True, token='hf_secret'))\n"
        "tell(lambda: EPDTable.from_pretrained('b').push_to_hub('me/table', private=True, token='hf_secret'))\n"
        "tell(lambda: EPDTable.from_pretrained('me/table'))\n"
        "tell(lambda: EPDTable.from_pretrained('me/table', token='hf_secret').table.sha256())\n"
        "tell(lambda: EPDTable.from_pretrained('me/table', revision='v1', token='hf_secret').table.sha256())\n"
        "tell(lambda: EPDTable.from_pretrained('me/table@v1', token='hf_secret').training)\n"
        f"for commit in {list(WRONG)}:\n"
        "    tell(lambda: EPDTable.from_pretrained('me/table', revision=commit, token='hf_secret'))\n",
    )
    assert hub.private and len(hub.commits) == 3
    assert hub.commits[0].keys() == {"README.md", "config.json", "epd_table.safetensors"}
    assert b'apply_epd(pipe, "me/table")' in hub.commits[0]["README.md"]
    assert lines[0].startswith("DownloadError: me/table cannot be uploaded: ") and "401" in lines[0]
    assert lines[1:3] == [f"{1:040x}", f"{2:040x}"]
    assert lines[3].startswith("DownloadError: cannot fetch config.json of me/table (no such folder here): ")
    assert lines[4:7] == [table_of(3).sha256(), TABLE.sha256(), "{'steps': 40}"]
    for line, (_, message) in zip(lines[7:], WRONG.values(), strict=True):
        assert message in line and line.startswith(("TableError", "DownloadError")), line
    assert not (tmp_path / "marker").exists()
    assert {name for _, name in hub.fetched} == {"config.json", "epd_table.safetensors"}  # the card neither
    assert (TOO_LARGE, "epd_table.safetensors") not in hub.fetched

    fetched = len(hub.fetched)
    cached = "tell(lambda: EPDTable.of('me/table').table.sha256())\n"
    assert in_a_process(hub, tmp_path, cached, offline=True) == [table_of(3).sha256()]
    assert len(hub.fetched) == fetched


# ----------------------------------------------------------------------------
# The document.


def test_examples_of_the_document(tmp_path, monkeypatch):
    """All that need no weights, account or run, in the order of docs/diffusers.md."""
    text = (ROOT / "docs/diffusers.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    foreign = ("stable-diffusion-v1-5/", "<run>", "hub-id")
    runnable = [example for example in examples if not any(name in example for name in foreign)]
    assert len(runnable) == 3 and len(examples) == 6
    (tmp_path / "src").mkdir()
    (tmp_path / "src/embedded").symlink_to(EMBEDDED)
    monkeypatch.chdir(tmp_path)
    values: dict[str, object] = {}
    for example in runnable:
        exec(compile(example, "docs/diffusers.md", "exec"), values)
    assert Image.open("car.png").size == (64, 64) and values["image"].size == (64, 64)
    assert values["again"].table.sha256() == values["table"].table.sha256()
    for example in set(examples) - set(runnable):
        compile(example, "docs/diffusers.md", "exec")
