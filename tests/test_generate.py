"""Sampling end to end on the embedded model: images that depend on seed and prompt only, folders that can be continued,
mistakes that cost nothing."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from run_folders import lines

import sample
import sample_baseline
from benchmarks.closed_form import MixtureDenoiser
from solver_utils import (
    HIGHEST_ORDER,
    SCHEDULE_TYPES,
    SOLVER_OPTIONS,
    SOLVERS_TO_ZERO,
    UNIPC_VARIANTS,
    SolverError,
    get_schedule,
)
from torch_utils import distributed
from torch_utils.errors import UserError
from training import table_metadata
from training.denoisers import BACKBONES, note_resolution, stable_diffusion
from training.denoisers.stable_diffusion import StableDiffusion
from training.generate import EXPLICIT, TABLE_SOLVERS, SamplingPlan, generate_images, table_schedule, write_images
from training.images import load_image
from training.manifest import Manifest, ManifestError, image_name
from training.ppo import launch
from training.ppo.cold_start import cold_start_table
from training.table import load_table, save_table

ROOT = Path(__file__).resolve().parents[1]
TEST_PROMPTS = ROOT / "src/prompts/emoji_test.txt"
PROMPTS = TEST_PROMPTS.read_text(encoding="utf-8").splitlines()
PLAN = SamplingPlan("ddim", 3, "discrete", 1.0, dataset_name="emoji")
BASE = ["--sampler", "ddim", "--dataset-name", "emoji", "--prompt-file", str(TEST_PROMPTS)]


@pytest.fixture(autouse=True)
def fresh_process_group():
    yield
    distributed.shutdown()


@pytest.fixture(scope="module")
def net():
    return PLAN.load_model(torch.device("cpu"))


def images(net, plan: SamplingPlan, seeds: list[int], batch: int) -> torch.Tensor:
    return torch.cat([part for _, _, part in generate_images(net, plan, seeds, [PROMPTS[s] for s in seeds], batch)])


def run_cli(command, *arguments: str):
    """On the CPU, as everything here, so that pictures can be compared bit for bit."""
    return CliRunner().invoke(command, [*arguments, "--device", "cpu"])


def start_table(folder: Path, **metadata: object) -> Path:
    path = folder / "table.json"
    save_table(replace(cold_start_table(3, 2), dataset_name="emoji", **metadata), path)
    return path


def manifest(folder: Path) -> list[dict]:
    return lines(folder / "manifest.jsonl")


def differ_by_rounding_only(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Matrix products of other heights round differently in the last bit: a pixel on the edge may move one level."""
    levels = ((one - other) * 255).abs()
    return bool(levels.max() <= 1.01 and (levels > 0.5).float().mean() < 1e-3)


def pngs(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


def test_a_table_that_claims_another_resolution_makes_the_models_pictures(tmp_path):
    """As the published Stable Diffusion v1.5 tables do; the models' own are 64 and 512 pixels."""
    folders = []
    for claimed in (None, 64, 1024):
        folder = tmp_path / str(claimed)
        folder.mkdir()
        table = start_table(folder, img_resolution=claimed)
        options = ["--prompt-file", str(TEST_PROMPTS), "--seeds", "3", "--outdir", str(folder / "out")]
        result = run_cli(sample.main, "--predictor_path", str(table), *options)
        assert result.exit_code == 0
        assert ("note: the table says 1024 pixels, the model makes 64" in result.stderr) == (claimed == 1024)
        folders.append(pngs(folder / "out"))
    assert folders[0] == folders[1] == folders[2] and len(folders[0]) == 1
    elsewhere = tmp_path / "v1-5.safetensors"  # a single file: its size is that of the configurations
    assert note_resolution("ms_coco", elsewhere, 512) is None
    assert "1024 pixels, the model makes 512" in note_resolution("ms_coco", elsewhere, 1024)


@pytest.mark.parametrize("options", [{}, {"s_churn": 3.0}], ids=["ddim", "edm with churn"])
def test_an_image_depends_on_seed_and_prompt_only(net, options):
    plan = PLAN if not options else SamplingPlan("edm", 3, "discrete", 1.0, options, to_zero=True, dataset_name="emoji")
    together = images(net, plan, [7, 3, 11, 0, 5], batch=5)
    for other in (
        images(net, plan, [7, 3, 11, 0, 5], batch=2),
        images(net, plan, [0, 5, 3, 7, 11], 3)[[3, 2, 4, 0, 1]],
    ):
        assert differ_by_rounding_only(together, other)
    assert (together[0] - together[1]).abs().mean() > 0.02


def sampled_as_counted(net, plan: SamplingPlan, seed: int) -> torch.Tensor:
    """The picture of `seed`, after a check that the plan counts what the network did."""
    before = net.calls, net.rows
    (picture,) = images(net, plan, [seed], batch=1)
    nfe = plan.nfe()
    assert (net.calls - before[0], net.rows - before[1]) == (nfe.parallel_nfe, nfe.nfe)
    assert nfe.forwards == 2 * nfe.nfe
    return picture


SAMPLER_OPTIONS = {
    "ddim": ([], {}),
    "dpm": (["--inner-steps", "2"], {"inner_steps": 2}),
    "dpm2": ([], {}),
    "heun": ([], {}),
    "edm": (["--s-churn", "3", "--s-max", "9"], {"s_churn": 3.0, "s_max": 9.0}),
    "ipndm": (["--max-order", "2"], {"max_order": 2}),
    "ipndm_v": (["--max-order", "4"], {"max_order": 4}),
    "deis": (["--max-order", "1"], {"max_order": 1}),
    "dpmpp": (["--no-lower-order-final"], {"lower_order_final": False}),
    "unipc": (["--variant", "bh1", "--lower-order-final"], {"variant": "bh1", "lower_order_final": True}),
}  # sampler -> arguments, options of the plan


@pytest.mark.parametrize("sampler", sample_baseline.SAMPLERS)
def test_every_sampler_of_the_command_line(net, tmp_path, sampler):
    """The command makes the picture of the plan, bit for bit, and its manifest says what the network did."""
    arguments, options = SAMPLER_OPTIONS[sampler]
    schedule = ["--num-steps", "3", "--schedule-type", "discrete", "--seeds", "4", "--outdir", str(tmp_path / "out")]
    result = run_cli(sample_baseline.main, "--sampler", sampler, *BASE[2:], *schedule, *arguments)
    assert result.exit_code == 0, result.output
    to_zero = sampler == "edm"
    plan = SamplingPlan(sampler, 3, "discrete", 1.0, options, to_zero=to_zero, dataset_name="emoji")
    assert torch.equal(load_image(tmp_path / "out" / image_name(4)), sampled_as_counted(net, plan, 4))
    (line,) = manifest(tmp_path / "out")
    assert (line["solver"], line["num_steps"]) == (sampler, 3)
    assert line["options"] == plan.record()["options"] and options.items() <= line["options"].items()
    assert (line["schedule_type"], line["sigmas"], line["final_zero"]) == ("discrete", None, to_zero)
    assert {name: line[name] for name in plan.record()} == plan.record()


@pytest.mark.parametrize("solver", SOLVERS_TO_ZERO)
def test_final_zero_is_one_more_evaluation(net, solver):
    short = SamplingPlan(solver, 3, "discrete", 1.0, dataset_name="emoji")
    long = replace(short, to_zero=True)
    assert long.sigmas(net).tolist() == [*short.sigmas(net).tolist(), 0.0]
    assert long.nfe().nfe == short.nfe().nfe + 1
    assert not torch.equal(sampled_as_counted(net, short, 0), sampled_as_counted(net, long, 0))


@pytest.mark.parametrize("sampler_stu", TABLE_SOLVERS)
def test_solvers_of_tables_and_max_rows(net, tmp_path, sampler_stu):
    """`--max-rows` changes how often the network is called, not what is recorded, and no pixel by more than a level."""
    path = start_table(tmp_path, sampler_stu=sampler_stu)
    plan = SamplingPlan.of_table(load_table(path), None, "float32")
    whole = torch.stack([sampled_as_counted(net, plan, seed) for seed in (0, 1)])
    before = net.calls, net.rows
    (part,) = [part for *_, part in generate_images(net, plan, [0, 1], PROMPTS[:2], batch=2, max_rows=3)]
    assert (net.calls - before[0], net.rows - before[1]) == (2 * (1 + 2), 2 * plan.nfe().nfe)  # 2 rows, then 3 and 1
    assert differ_by_rounding_only(part, whole)
    arguments = ["--prompt-file", str(TEST_PROMPTS), "--seeds", "0-1", "--max-rows", "1"]
    for more in (arguments, arguments[:-2]):  # finished images are kept: it is the same plan
        result = run_cli(
            sample.main, "--predictor_path", str(path), *more, "--outdir", str(tmp_path / "out"), "--batch", "2"
        )
        assert result.exit_code == 0, result.output
    assert "0 images to make, 2 finished before" in result.output
    assert differ_by_rounding_only(torch.stack([load_image(tmp_path / "out" / image_name(s)) for s in (0, 1)]), whole)
    line = manifest(tmp_path / "out")[0]
    assert (line["solver"], line["options"]) == (plan.solver, plan.options)
    assert (line["nfe"], line["parallel_nfe"], line["forwards"]) == (6, 4, 12)


def test_max_rows_is_for_tables(tmp_path):
    with pytest.raises(UserError, match="ddim takes no option max_rows; it belongs to epd"):
        write_images(PLAN, [0], PROMPTS[:1], tmp_path / "out", batch=1, device="cpu", max_rows=4)
    assert not (tmp_path / "out").exists()


def test_explicit_nodes_are_the_schedule_that_they_copy(net, tmp_path):
    """A built schedule, listed: the same file, byte for byte. A last 0 is --final-zero, and edm adds none itself."""
    nodes = PLAN.sigmas(net).tolist()
    listed = ",".join(map(repr, nodes))
    write_images(PLAN, [0], PROMPTS[:1], tmp_path / "built", batch=1, device="cpu")
    common = [*BASE[2:], "--seeds", "0"]
    for name, arguments in (
        ("ddim", ["--sampler", "ddim", "--sigmas", listed]),
        ("ddim-0", ["--sampler", "ddim", "--sigmas", listed + ", 0"]),
        ("ddim-zero", ["--sampler", "ddim", "--sigmas", listed, "--final-zero"]),
        ("edm", ["--sampler", "edm", "--sigmas", listed]),
        ("edm-0", ["--sampler", "edm", "--sigmas", listed + ",0"]),
        ("edm-no-zero", ["--sampler", "edm", "--num-steps", "3", "--schedule-type", "discrete", "--no-final-zero"]),
    ):
        result = run_cli(sample_baseline.main, *arguments, *common, "--outdir", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    assert pngs(tmp_path / "ddim") == pngs(tmp_path / "built")
    assert pngs(tmp_path / "ddim-0") == pngs(tmp_path / "ddim-zero") != pngs(tmp_path / "ddim")
    assert manifest(tmp_path / "ddim-0") == manifest(tmp_path / "ddim-zero")
    assert pngs(tmp_path / "edm") == pngs(tmp_path / "edm-no-zero") != pngs(tmp_path / "edm-0")
    (line,), (ended,) = manifest(tmp_path / "ddim"), manifest(tmp_path / "edm-0")
    assert (line["schedule_type"], line["schedule_rho"], line["num_steps"]) == (EXPLICIT, None, 3)
    assert (line["sigmas"], line["final_zero"], line["nfe"]) == (nodes, False, 2)
    assert (ended["sigmas"], ended["final_zero"], ended["num_steps"], ended["nfe"]) == ([*nodes, 0.0], True, 3, 5)
    refused = run_cli(
        sample_baseline.main, "--sampler", "ddim", "--sigmas", listed, *common, "--outdir", str(tmp_path / "built")
    )
    assert (refused.exit_code, "made with schedule_type 'discrete', not 'explicit'" in refused.output) == (2, True)


def test_explicit_nodes_stay_where_the_model_was_trained(net, tmp_path):
    plan = SamplingPlan("ddim", 2, EXPLICIT, None, dataset_name="emoji")
    assert replace(plan, sigmas_list=(1.0009 * net.sigma_max, 1.0)).sigmas(net)[0] > net.sigma_max  # a rounded figure
    high = replace(plan, sigmas_list=(1.0011 * net.sigma_max, 1.0))
    with pytest.raises(SolverError, match=r"begins at sigma .*, beyond the model's noise levels"):
        write_images(high, [0], PROMPTS[:1], tmp_path / "out", batch=1, device="cpu")
    assert not list((tmp_path / "out").glob("[!.]*"))
    with pytest.raises(SolverError, match=r"begins at sigma 1\.0005"):
        replace(plan, sigmas_list=(1.0005, 0.5)).sigmas(FlowNet())
    assert replace(plan, sigmas_list=(1.0, 0.5), to_zero=True).sigmas(FlowNet()).tolist() == [1.0, 0.5, 0.0]


def test_a_plan_that_contradicts_its_nodes_is_refused():
    plan = SamplingPlan("ddim", 2, EXPLICIT, None, sigmas_list=(3.0, 1.0), dataset_name="emoji")
    plan.check()
    for change in ({"num_steps": 3}, {"schedule_type": "discrete"}):
        with pytest.raises(SolverError, match="2 explicit sigmas do not make a schedule"):
            replace(plan, **change).check()


class FlowNet(MixtureDenoiser):
    """A flow model that a plan can be laid out for."""

    dataset_name, device = "mixture", torch.device("cpu")

    def __init__(self):
        super().__init__(is_flow=True, flow_shift=3.0)


@pytest.mark.parametrize(
    ("made_for", "wanted"),
    [
        ({}, {}),
        ({"flowmatch_shift": 2.0}, {"shift": 2.0}),
        ({"flowmatch_mu": 1.15}, {"mu": 1.15}),
        ({"flowmatch_shift": 3.0, "flowmatch_mu": 1.15}, {"mu": 1.15}),  # as the published FLUX tables have it
        ({"flowmatch_shift": 3.0, "schedule_type": "polynomial"}, {"schedule_type": "polynomial"}),
    ],
)
def test_the_time_shift_of_a_table_reaches_its_schedule(made_for, wanted):
    net = FlowNet()
    table = replace(cold_start_table(5, 2), **({"schedule_type": "flowmatch"} | made_for))
    expected = get_schedule(5, 0.003, 1.0, schedule_rho=1, net=net, **({"schedule_type": "flowmatch"} | wanted))
    assert torch.equal(table_schedule(table, net), expected)
    plan = SamplingPlan.of_table(table, None, "float32")
    assert torch.equal(plan.sigmas(net), expected)
    record = plan.record()
    assert (record["flowmatch_shift"], record["flowmatch_mu"]) == (wanted.get("shift"), wanted.get("mu"))


def test_training_refuses_the_schedule_of_flow_models_too(tmp_path):
    values = ("model.schedule_type=flowmatch", f"run.output_root={tmp_path / 'exps'}")
    overrides = [part for value in values for part in ("--override", value)]
    config = ROOT / "training/ppo/cfgs/embedded.yaml"
    result = run_cli(launch.main, "--config", str(config), "--device", "cpu", *overrides)
    assert (result.exit_code, "Error: schedule flowmatch is for flow models" in result.output) == (2, True)
    assert not (tmp_path / "exps").exists()


def test_backbones_say_themselves_whether_they_are_flow_models(net):
    assert net.is_flow == BACKBONES["emoji"].family.is_flow


def test_folder_and_manifest(tmp_path):
    out = tmp_path / "out"
    result = run_cli(
        sample.main,
        "--predictor_path",
        str(start_table(tmp_path)),
        "--prompt-file",
        str(TEST_PROMPTS),
        "--seeds",
        "3,0-1",
        "--outdir",
        str(out),
        "--grid",
    )
    assert result.exit_code == 0, result.output
    records = manifest(out)
    assert [line["seed"] for line in records] == [0, 1, 3]
    assert [line["prompt"] for line in records] == [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    assert {line["file"] for line in records} == {"000000/000000.png", "000000/000001.png", "000000/000003.png"}
    assert {(line["nfe"], line["parallel_nfe"], line["forwards"]) for line in records} == {(6, 4, 12)}
    assert load_image(out / "000000/000003.png").shape == (3, 64, 64)
    assert load_image(out / "grid.png").shape == (3, 64, 3 * 64)
    assert not list(out.glob("manifest-rank*"))


def test_images_of_the_second_thousand_have_their_own_folder():
    assert [image_name(seed) for seed in (999, 1000, 12345)] == [
        "000000/000999.png",
        "001000/001000.png",
        "012000/012345.png",
    ]


def test_continues_and_mends(tmp_path):
    seeds, prompts = [0, 1, 2, 3], PROMPTS[:4]
    write_images(PLAN, seeds[:3], prompts[:3], tmp_path / "out", batch=2, device="cpu")
    first = pngs(tmp_path / "out")
    (tmp_path / "out" / image_name(0)).unlink()
    damaged = tmp_path / "out" / image_name(1)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    untouched = (tmp_path / "out" / image_name(2)).stat().st_mtime_ns
    write_images(PLAN, seeds, prompts, tmp_path / "out", batch=2, device="cpu")
    second = pngs(tmp_path / "out")
    assert {name: second[name] for name in first} == first
    assert image_name(3) in second
    assert (tmp_path / "out" / image_name(2)).stat().st_mtime_ns == untouched
    assert len((tmp_path / "out/manifest.jsonl").read_text().splitlines()) == 4


def test_what_is_left_is_made_in_the_batches_of_the_whole(tmp_path, monkeypatch):
    """What else is in its batch moves an image's last bits, and so does compiling, which is for full batches."""
    made, compiled = [], []
    decode = StableDiffusion.decode
    monkeypatch.setattr(
        StableDiffusion, "decode", lambda self, latents: made.append(len(latents)) or decode(self, latents)
    )
    monkeypatch.setattr(StableDiffusion, "compile_calls", lambda self, compiling: compiled.append(compiling))

    def sample(count: int, missing: list[int], mode: str = "default") -> tuple[list[int], list[bool]]:
        made.clear()
        compiled.clear()
        for seed in missing:
            (tmp_path / image_name(seed)).unlink(missing_ok=True)
        write_images(PLAN, list(range(count)), PROMPTS[:count], tmp_path, batch=2, device="cpu", compile_mode=mode)
        return list(made), list(compiled)

    assert sample(5, []) == ([2, 2, 1], [True, True, False])
    whole = pngs(tmp_path)
    kept = (tmp_path / image_name(2)).stat().st_mtime_ns
    assert sample(5, [3]) == ([2], [True])
    assert sample(5, [0, 4]) == ([2, 1], [True, False])
    assert pngs(tmp_path) == whole and (tmp_path / image_name(2)).stat().st_mtime_ns == kept
    assert sample(3, [0, 1, 2]) == ([2, 1], [False, False])  # a single full batch: compiling takes longer
    assert sample(4, [0, 1, 2, 3], "max") == ([2, 2], [False, True])  # no picture waits for max


@pytest.mark.parametrize("place", [image_name(1), str(Path(image_name(1)).parent)])
def test_what_stands_in_a_picture_s_way_is_one_line(tmp_path, place):
    """A folder where a file should be, a file where a folder should be."""
    out, aside = tmp_path / "out", tmp_path / "aside"
    words = [*BASE, "--schedule-type", "discrete", "--num-steps", "3", "--seeds", "0-1", "--outdir", str(out)]
    assert run_cli(sample_baseline.main, *words).exit_code == 0
    made = pngs(out)
    (out / place).rename(aside)
    if aside.is_dir():
        (out / place).write_text("")
    else:
        (out / place).mkdir()
    result = run_cli(sample_baseline.main, *words)
    assert result.exit_code == 2
    assert f"Error: {out / place}: " in result.output
    assert result.output.endswith("; what was finished is kept, mend that and start again\n")
    (out / place).rename(tmp_path / "obstacle")
    assert run_cli(sample_baseline.main, *words).exit_code == 0
    assert pngs(out) == made


def test_interrupted_run_leaves_lines_that_the_next_one_uses(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=1, device="cpu")
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").unlink()
    (out / "manifest-rank0.jsonl").write_text(lines[0] + "\n" + lines[1][: len(lines[1]) // 2])  # cut off in mid-line
    kept = (out / image_name(0)).stat().st_mtime_ns
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=1, device="cpu")
    assert (out / image_name(0)).stat().st_mtime_ns == kept
    assert [record["seed"] for record in manifest(out)] == [0, 1]


@pytest.mark.parametrize(("with_table", "advice"), [(False, "lower --batch."), (True, "--max-rows (now no limit)")])
def test_too_many_images_for_the_gpu_are_said_and_fewer_go_on(tmp_path, monkeypatch, with_table, advice):
    """The memory gives out at the second batch; the first one's pictures stay."""
    table = start_table(tmp_path)
    plan = SamplingPlan.of_table(load_table(table), None, "float32") if with_table else PLAN
    decode, done = StableDiffusion.decode, []

    def hungry(self, latents):
        if done:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        done.append(len(latents))
        return decode(self, latents)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusion, "decode", hungry)
        with pytest.raises(UserError, match="does not suffice for 2 images at a time") as caught:
            write_images(plan, [0, 1, 2], PROMPTS[:3], out, batch=2, device="cpu")
    assert advice in str(caught.value)
    distributed.shutdown()
    before = pngs(out)
    assert len(before) == 2
    write_images(plan, [0, 1, 2], PROMPTS[:3], out, batch=1, device="cpu")
    after = pngs(out)
    assert len(after) == 3 and before.items() <= after.items()


def test_a_gpu_without_room_for_the_model_is_not_told_to_lower_the_batch(tmp_path, monkeypatch):
    def hungry(folder, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(stable_diffusion, "load_folder", hungry)
    result = run_cli(sample_baseline.main, *BASE, "--seeds", "0", "--outdir", str(tmp_path / "out"))
    assert result.exit_code == 2 and "lower --batch" not in result.output
    assert "cpu has not the memory that the model itself takes in float32" in result.output


def test_pictures_that_another_node_kept_are_missed(tmp_path):
    """Two nodes with folders of their own: rank 0 sees its own lines only."""
    manifest = Manifest(tmp_path, PLAN.record())
    (tmp_path / "000000").mkdir()
    for seed in (0, 1):
        (tmp_path / image_name(seed)).write_bytes(b"picture")
    with manifest.writer(0) as add:
        add(0, "a")
        add(1, "b")
    with pytest.raises(ManifestError, match=r"lacks 2 images .*, seed 2 first: is the folder on a disk that all nodes"):
        manifest.join([0, 1, 2, 3])
    manifest.join([0, 1])  # what was here is kept
    assert [line["seed"] for line in map(json.loads, manifest.path.open())] == [0, 1]


def test_a_run_cut_off_before_its_manifest_needs_no_new_image(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu")
    (out / "manifest.jsonl").rename(out / "manifest-rank0.jsonl")
    before = pngs(out)
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu")
    assert pngs(out) == before
    assert [record["seed"] for record in manifest(out)] == [0, 1]
    assert not list(out.glob("manifest-rank*"))


def test_other_plan_is_refused_and_overwrite_replaces(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")
    before = pngs(out)
    other = SamplingPlan("heun", 3, "discrete", 1.0, dataset_name="emoji")
    with pytest.raises(UserError, match="seed 0 made with solver 'ddim', not 'heun'"):
        write_images(other, [0], PROMPTS[:1], out, batch=1, device="cpu")
    with pytest.raises(UserError, match="made with prompt"):
        write_images(PLAN, [0], ["another prompt"], out, batch=1, device="cpu")
    assert pngs(out) == before
    write_images(other, [0], PROMPTS[:1], out, batch=1, device="cpu", overwrite=True)
    assert pngs(out) != before
    assert json.loads((out / "manifest.jsonl").read_text())["solver"] == "heun"


def test_overwrite_mends_a_damaged_manifest_but_a_refused_plan_leaves_it_alone(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu")
    whole = (out / "manifest.jsonl").read_bytes()
    high = SamplingPlan("ddim", 2, EXPLICIT, None, sigmas_list=(1e4, 1.0), dataset_name="emoji")
    with pytest.raises(UserError, match="begins at sigma 10000"):  # known only when the model is loaded
        write_images(high, [0], PROMPTS[:1], out, batch=1, device="cpu", overwrite=True)
    assert (out / "manifest.jsonl").read_bytes() == whole
    flow = SamplingPlan("ddim", 3, "flowmatch", 1.0, dataset_name="emoji")
    with pytest.raises(UserError, match="flowmatch is for flow models"):
        write_images(flow, [0], PROMPTS[:1], out, batch=1, device="cpu", overwrite=True)
    assert (out / "manifest.jsonl").read_bytes() == whole
    (out / "manifest.jsonl").write_bytes(whole[:-9] + b"\xff\n")
    with pytest.raises(UserError, match="line 2 is damaged; use --overwrite"):
        write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu", overwrite=True)
    assert (out / "manifest.jsonl").read_bytes() == whole


def test_an_image_of_an_earlier_version_is_named_as_such(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")
    line = json.loads((out / "manifest.jsonl").read_text())
    del line["final_zero"]
    (out / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="does not say its final_zero: an earlier version made it"):
        write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")


def test_a_range_beyond_the_model_is_refused(net):
    for schedule_type in ("polynomial", "discrete"):
        plan = SamplingPlan("ddim", 4, schedule_type, 1.0, sigma_max=80.0, dataset_name="emoji")
        with pytest.raises(
            SolverError, match=r"begins at sigma 80, beyond the model's noise levels, which end at 14\.6"
        ):
            plan.sigmas(net)


def test_a_table_per_sample_is_for_rollouts_only():
    table = cold_start_table(4, 2)
    rows = {name: getattr(table, name).expand(2, -1, -1) for name in ("positions", "weights")}
    plan = SamplingPlan.of_table(replace(table, scale_dir=None, scale_time=None, **rows), None, "float32")
    with pytest.raises(SolverError, match="sampling takes one table, not 2"):
        plan.check()


def test_infinity_stays_out_of_the_record():
    plans = [SamplingPlan("edm", 3, "discrete", 1.0, options) for options in ({}, {"s_max": math.inf})]
    assert plans[0].record() == plans[1].record() and "s_max" not in plans[0].record()["options"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with contextlib.ExitStack() as locks:
        Manifest(out, {}).open(locks)
        with pytest.raises(UserError, match="another process writes to"):
            write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")
    write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")


def test_a_multistep_table_samples_at_its_own_order():
    table = cold_start_table(4, 2)
    for metadata, solver, options in (
        ({"sampler_stu": "epd", "max_order": 7}, "epd", {}),
        ({"sampler_stu": "ipndm", "max_order": 1}, "epd_ipndm", {"max_order": 1}),
        ({"sampler_stu": "ipndm", "max_order": 4}, "epd_ipndm", {"max_order": 4}),
        ({"sampler_stu": "ipndm", "max_order": None}, "epd_ipndm", {}),
        ({"sampler_stu": "dpmpp"}, "epd_dpmpp", {"max_order": 2, "lower_order_final": True}),
        (
            {"sampler_stu": "dpmpp", "max_order": 3, "lower_order_final": False},
            "epd_dpmpp",
            {"max_order": 3, "lower_order_final": False},
        ),
    ):
        plan = SamplingPlan.of_table(replace(table, dataset_name="emoji", **metadata), None, "float32")
        plan.check()
        assert (plan.solver, plan.options) == (solver, options)


def test_tables_know_the_solvers_that_read_them():
    highest = {name: HIGHEST_ORDER.get(solver) for name, solver in TABLE_SOLVERS.items()}
    assert highest == table_metadata.TABLE_ORDERS
    assert set(TABLE_SOLVERS.values()) == {name for name, options in SOLVER_OPTIONS.items() if "table" in options}


def test_default_folders_tell_plans_apart():
    """Solver options, schedule and counts all show in the name, in plain characters."""
    ddim = SamplingPlan("ddim", 11, "discrete", 1.0, dataset_name="emoji")
    explicit = replace(ddim, schedule_type=EXPLICIT, schedule_rho=None, num_steps=3, sigmas_list=(14.6, 3.0, 0.5))
    unipc = replace(ddim, solver="unipc")
    dpmpp = SamplingPlan.of_table(replace(cold_start_table(11, 2), sampler_stu="dpmpp"), None, "float32")
    named = {
        "emoji-ddim-discrete-nfe10-para10": ddim,
        "emoji-ddim-discrete-zero-nfe11-para11": replace(ddim, to_zero=True),
        "emoji-ddim-discrete-nfe11-para11": replace(ddim, num_steps=12),
        "emoji-ddim-discrete-afs-nfe10-para10": replace(ddim, num_steps=12, afs=True),
        "emoji-ddim-logsnr-nfe10-para10": replace(ddim, schedule_type="logsnr"),
        "emoji-ddim-discrete-rho2.5-nfe10-para10": replace(ddim, schedule_rho=2.5),
        "emoji-ddim-polynomial-nfe10-para10": replace(ddim, schedule_type="polynomial", schedule_rho=7.0),
        "emoji-ddim-discrete-sigma_min0.03-sigma_max14-nfe10-para10": replace(ddim, sigma_min=0.03, sigma_max=14.0),
        "emoji-ddim-flowmatch-shift3-nfe10-para10": replace(ddim, schedule_type="flowmatch", flowmatch_shift=3.0),
        "emoji-ddim-flowmatch-mu1.15-nfe10-para10": replace(ddim, schedule_type="flowmatch", flowmatch_mu=1.15),
        "emoji-unipc-discrete-nfe10-para10": unipc,
        "emoji-unipc-max_order3-variantbh1-discrete-nfe10-para10": replace(
            unipc, options={"variant": "bh1", "max_order": 3}
        ),
        "emoji-unipc-no_lower_order_final-discrete-nfe10-para10": replace(unipc, options={"lower_order_final": False}),
        "emoji-edm-s_churn3-s_max1e20-discrete-zero-nfe21-para21": replace(
            ddim, solver="edm", options={"s_churn": 3.0, "s_max": 1e20}, to_zero=True
        ),
        "ms_coco-epd_dpmpp-discrete-nfe30-para20": dpmpp,
        "emoji-ddim-explicit72557f-nfe2-para2": explicit,
        "emoji-ddim-explicitf1fad9-zero-nfe3-para3": replace(explicit, to_zero=True),
        "emoji-ddim-explicit15b221-nfe2-para2": replace(explicit, sigmas_list=(14.6, 3.0, 0.6)),
    }
    assert [plan.default_outdir() for plan in named.values()] == [Path("samples") / name for name in named]
    assert all(re.fullmatch(r"[\w.-]+", name) for name in named)


def test_the_record_says_the_options_that_were_not_given():
    plan = SamplingPlan("unipc", 3, "discrete", 1.0, {"variant": "bh1"}, dataset_name="emoji")
    assert plan.record()["options"] == {"max_order": 2, "variant": "bh1", "lower_order_final": True}


def test_strange_pictures_are_not_mixed_in(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds pictures but no manifest"):
        write_images(PLAN, [0], PROMPTS[:1], tmp_path, batch=1, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BASE, "--seeds", "0-5000"], "seed 1000 has no prompt: 1000 prompts serve seeds 0-999"),
        ([*BASE, "--seeds", "5-1"], "the range 5-1 runs backwards"),
        (
            [*BASE, "--max-order", "3"],
            "ddim takes no option max_order; it belongs to ipndm, ipndm_v, deis, dpmpp, unipc",
        ),
        ([*BASE, "--inner-steps", "2"], "ddim takes no option inner_steps; it belongs to dpm"),
        ([*BASE, "--variant", "bh1"], "ddim takes no option variant; it belongs to unipc"),
        ([*BASE, "--lower-order-final"], "ddim takes no option lower_order_final; it belongs to dpmpp, unipc"),
        ([*BASE, "--no-lower-order-final"], "ddim takes no option lower_order_final; it belongs to dpmpp, unipc"),
        ([*BASE, "--s-churn", "0"], "ddim takes no option s_churn; it belongs to edm"),
        (["--sampler", "heun", *BASE[2:], "--s-min", "1"], "heun takes no option s_min; it belongs to edm"),
        (["--sampler", "deis", *BASE[2:], "--variant", "bh2"], "deis takes no option variant"),
        (["--sampler", "deis", *BASE[2:], "--lower-order-final"], "deis takes no option lower_order_final"),
        (["--sampler", "deis", *BASE[2:], "--max-order", "5"], "max_order of deis must be 1 to 4"),
        (
            ["--sampler", "dpmpp", *BASE[2:], "--max-order", "4"],
            "max_order of dpmpp must be 1 to 3",
        ),
        (
            ["--sampler", "unipc", *BASE[2:], "--max-order", "0"],
            "max_order of unipc must be 1 to 3",
        ),
        (["--sampler", "ipndm_v", *BASE[2:], "--max-order", "2.5"], "'2.5' is not a valid integer"),
        (["--sampler", "unipc", *BASE[2:], "--variant", "bh3"], "'bh3' is not one of 'bh1', 'bh2'"),
        (["--sampler", "dpm", *BASE[2:], "--inner-steps", "0"], "inner_steps must be at least 1"),
        (["--sampler", "epd", *BASE[2:]], "'epd' is not one of 'ddim'"),
        (["--sampler", "dpm", *BASE[2:], "--final-zero"], "dpm cannot step to sigma 0; only edm, ddim"),
        (["--sampler", "dpm2", *BASE[2:], "--final-zero"], "dpm2 cannot step to sigma 0"),
        (["--sampler", "heun", *BASE[2:], "--sigmas", "14.6,1,0"], "heun cannot step to sigma 0"),
        ([*BASE, "--schedule-type", "flowmatch"], "flowmatch is for flow models; use discrete or polynomial for emoji"),
        ([*BASE, "--flowmatch-mu", "1"], "shift and mu belong to schedule flowmatch, not to time_uniform"),
        (
            [*BASE, "--schedule-type", "flowmatch", "--flowmatch-shift", "3", "--flowmatch-mu", "1"],
            "give shift 3 or mu 1, not both",
        ),
        ([*BASE, "--schedule-type", "explicit"], "unknown schedule type 'explicit'"),
        ([*BASE, "--sigmas", ""], "--sigmas: entry 1 is empty"),
        ([*BASE, "--sigmas", "3,,1"], "--sigmas: entry 2 is empty"),
        ([*BASE, "--sigmas", "3,1,"], "--sigmas: entry 3 is empty"),
        ([*BASE, "--sigmas", "3,1,O.1"], "--sigmas: entry 3 is 'O.1', not a number"),
        ([*BASE, "--sigmas", "3 1"], "--sigmas: entry 1 is '3 1', not a number"),
        ([*BASE, "--sigmas", "3"], "a list of sigmas needs at least 2 nodes, got 1"),
        ([*BASE, "--sigmas", "3,0"], "--sigmas needs at least 2 nodes above 0"),
        ([*BASE, "--sigmas", "3,4"], "fall strictly towards 0, but node 0 is 3 and the next 4"),
        ([*BASE, "--sigmas", "3,0,0"], "fall strictly towards 0, but node 1 is 0 and the next 0"),
        ([*BASE, "--sigmas", "3,1,-1"], "fall strictly towards 0, but node 1 is 1 and the next -1"),
        ([*BASE, "--sigmas", "nan,1"], "sigmas must be finite"),
        ([*BASE, "--sigmas", "inf,1"], "sigmas must be finite"),
        ([*BASE, "--sigmas", "3,1", "--num-steps", "11"], "leave out --num-steps"),
        ([*BASE, "--sigmas", "3,1", "--schedule-type", "discrete"], "leave out --schedule-type"),
        ([*BASE, "--sigmas", "3,1", "--schedule-rho", "1"], "leave out --schedule-rho"),
        ([*BASE, "--sigmas", "3,1", "--sigma-min", "1"], "leave out --sigma-min"),
        ([*BASE, "--sigmas", "3,1", "--sigma-max", "3"], "leave out --sigma-max"),
        ([*BASE, "--sigmas", "3,1", "--flowmatch-shift", "3"], "leave out --flowmatch-shift"),
        ([*BASE, "--sigmas", "3,1", "--flowmatch-mu", "3"], "leave out --flowmatch-mu"),
        (
            ["--sampler", "edm", *BASE[2:], "--sigmas", "3,1,0", "--no-final-zero"],
            "--sigmas ends in 0; leave out that 0",
        ),
        ([*BASE, "--num-steps", "1"], "num_steps must be at least 2"),
        ([*BASE, "--schedule-type", "cosine"], "unknown schedule type 'cosine'; use one of polynomial"),
        ([*BASE, "--schedule-rho", "-1"], "schedule_rho must be 0.05 to 1000, got -1"),
        ([*BASE, "--schedule-rho", "0.003"], "schedule_rho must be 0.05 to 1000, got 0.003"),
        (
            [*BASE, "--schedule-type", "logsnr", "--schedule-rho", "3"],
            "--schedule-rho 3: schedule logsnr has no exponent",
        ),
        ([*BASE, "--sigma-max", "1e200"], "sigma_max <= 1e+06, got sigma_max 1e+200"),
        ([*BASE, "--sigma-min", "-1"], "need 0 < sigma_min < sigma_max <= 1e+06, got sigma_min -1"),
        (["--sampler", "edm", *BASE[2:], "--s-max", "nan"], "s_max must be a finite number, got nan"),
        (["--sampler", "edm", *BASE[2:], "--s-min", "5", "--s-max", "2"], "s_min 5 lies above s_max 2"),
        (["--sampler", "edm", *BASE[2:], "--s-max", "-1"], "s_min 0 lies above s_max -1"),
        ([*BASE, "--num-steps", "1000000000000"], "num_steps must be at most 100000, got 1000000000000"),
        (["--sampler", "edm", *BASE[2:], "--s-noise", "-1"], "s_noise must not be negative, got -1"),
        ([*BASE, "--sigma-min", "20", "--sigma-max", "3"], "need 0 < sigma_min < sigma_max <= 1e+06, got sigma_min 20"),
        (["--sampler", "edm", *BASE[2:], "--s-churn", "nan"], "s_churn must be a finite number, got nan"),
        ([*BASE, "--prompt", "also this"], "one of the two"),
        ([*BASE[:4]], "one of the two"),
        ([*BASE, "--guidance-rate", "-3"], "guidance_rate -3.0 must be"),
        ([*BASE, "--model-path", "no/such/model"], "model no/such/model does not exist; give a folder"),
        (["--sampler", "euler", *BASE[2:]], "'euler' is not one of 'ddim'"),
        ([*BASE[:2], "--dataset-name", "lsun", *BASE[4:]], "unknown dataset_name 'lsun'"),
    ],
)
def test_mistakes_cost_one_line_and_nothing_else(tmp_path, arguments, message):
    out = tmp_path / "out"
    result = run_cli(sample_baseline.main, *arguments, "--outdir", str(out))
    assert result.exit_code == 2
    error = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(error) == 1
    assert message in error[0]
    assert not out.exists()


def test_a_mistake_is_found_without_an_outdir_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--num-steps", "1"], "num_steps must be at least 2"),
        (["--sigmas", "3"], "a list of sigmas needs at least 2 nodes"),
        (["--final-zero", "--s-noise", "1"], "ddim takes no option s_noise"),
    ):
        result = run_cli(sample_baseline.main, *BASE, *arguments)
        assert (result.exit_code, result.output.count("Error: "), message in result.output) == (2, 1, True)
    assert not list(tmp_path.iterdir())


def test_the_command_line_agrees_with_solver_utils():
    """Names, ranges and defaults that `--help` gives without loading torch."""
    without_table = {name: options for name, options in SOLVER_OPTIONS.items() if "table" not in options}
    assert tuple(without_table) == sample_baseline.SAMPLERS
    assert sample_baseline.VARIANTS == UNIPC_VARIANTS
    parameters = {parameter.name: parameter for parameter in sample_baseline.main.params}
    assert {name for options in without_table.values() for name in options} - {"randn_like"} <= set(parameters)
    assert set(sample_baseline.SCHEDULE_OPTIONS) <= set(parameters)
    assert re.findall(r"\b[a-z]+(?:_[a-z]+)?\b", parameters["schedule_type"].help)[:4] == list(SCHEDULE_TYPES[:4])
    assert SCHEDULE_TYPES[4:] == ("flowmatch",) and "flowmatch" in parameters["schedule_type"].help
    by_name = r"[a-z]\w*"
    for name in ("inner_steps", "s_churn", "s_min", "s_max", "s_noise", "max_order", "variant", "lower_order_final"):
        takers = [solver for solver, options in without_table.items() if name in options]
        told = parameters[name].help.removeprefix("Of ").split(":")[0]
        assert re.findall(by_name, told) == takers, name
        if name == "max_order":
            ranges = [(re.findall(by_name, part), int(part[-1])) for part in re.findall(r"([^()]*\(1-\d)\)", told)]
            assert {solver: top for solvers, top in ranges for solver in solvers} == {
                solver: HIGHEST_ORDER[solver] for solver in takers
            }
        (default,) = {without_table[solver][name] for solver in takers}
        text = "yes" if default is True else default if isinstance(default, str) else f"{default:g}"
        assert parameters[name].show_default == text, name
    assert set(re.findall(by_name, parameters["final_zero"].help.split("not of ")[1])) == set(without_table) - set(
        SOLVERS_TO_ZERO
    )


def test_the_default_folder_in_the_help_is_the_one_in_the_code():
    (outdir,) = [parameter for parameter in sample.main.params if parameter.name == "outdir"]
    assert outdir.show_default in SamplingPlan.default_outdir.__doc__


def test_bad_predictors(tmp_path):
    truncated = tmp_path / "cut.pkl"
    truncated.write_bytes(b"\x80\x04\x95")
    for path, message in ((tmp_path / "missing.pkl", "missing.pkl"), (truncated, "cut.pkl")):
        result = run_cli(sample.main, "--predictor_path", str(path), "--prompt", "x", "--outdir", str(tmp_path / "out"))
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert message in result.output
    table = start_table(tmp_path, sampler_stu="dpmpp")
    table.write_text(table.read_text().replace('"max_order": 2', '"max_order": 4'))
    flow = tmp_path / "flow"
    flow.mkdir()
    for path, message in (
        (table, "table.json: max_order is 4; dpmpp has orders 1 to 3"),
        (start_table(flow, schedule_type="flowmatch"), "flowmatch is for flow models"),
    ):
        result = run_cli(
            sample.main,
            "--predictor_path",
            str(path),
            "--prompt",
            "x",
            "--seeds",
            "0",
            "--outdir",
            str(tmp_path / "out"),
        )
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert message in result.output
    assert not (tmp_path / "out").exists()


def test_blank_line_in_the_prompts_is_named(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nthree\n")
    result = run_cli(sample_baseline.main, "--sampler", "ddim", "--prompt-file", str(prompts), "--seeds", "0")
    assert result.exit_code == 2
    assert "prompts.txt, line 2: blank prompt" in result.output


def test_missing_stable_diffusion_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    result = run_cli(
        sample_baseline.main, "--sampler", "ddim", "--prompt", "x", "--seeds", "0", "--outdir", str(tmp_path / "o")
    )
    assert result.exit_code == 2
    assert "unet/diffusion_pytorch_model.safetensors (SHA-256 19da7aaa" in result.output
    assert str(tmp_path / "cache") in result.output
    assert not (tmp_path / "o").exists()
