"""Sampling end to end on the embedded model: images that depend on seed and prompt only, folders that can be continued,
mistakes that cost nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import sample
import sample_baseline
from solvers import SOLVERS
from torch_utils import distributed
from torch_utils.errors import UserError
from training.generate import SamplingPlan, generate_images, write_images
from training.images import load_image
from training.manifest import Manifest, image_name
from training.ppo.cold_start import cold_start_table
from training.table import save_table

ROOT = Path(__file__).resolve().parents[1]
TEST_PROMPTS = ROOT / "src/prompts/emoji_test.txt"
PROMPTS = TEST_PROMPTS.read_text(encoding="utf-8").splitlines()
PLAN = SamplingPlan("ddim", 3, "discrete", 1.0, dataset_name="emoji")


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
    return CliRunner().invoke(command, list(arguments))


def start_table(folder: Path) -> Path:
    path = folder / "table.json"
    table = cold_start_table(3, 2)
    values = table.to_dict() | {"dataset_name": "emoji"}
    save_table(type(table).from_dict(values), path)
    return path


def pngs(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("options", [{}, {"s_churn": 3.0}], ids=["ddim", "edm with churn"])
def test_an_image_depends_on_seed_and_prompt_only(net, options):
    plan = PLAN if not options else SamplingPlan("edm", 3, "discrete", 1.0, options, to_zero=True, dataset_name="emoji")
    together = images(net, plan, [7, 3, 11, 0, 5], batch=5)
    for other in (
        images(net, plan, [7, 3, 11, 0, 5], batch=2),
        images(net, plan, [0, 5, 3, 7, 11], 3)[[3, 2, 4, 0, 1]],
    ):
        # Matrix products of other heights round differently in the last bit: a pixel on the edge may move one level.
        levels = ((together - other) * 255).abs()
        assert levels.max() <= 1
        assert (levels > 0.5).float().mean() < 1e-3
    assert (together[0] - together[1]).abs().mean() > 0.02


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not name.startswith("epd")])
def test_counted_evaluations_are_those_of_the_network(net, solver):
    plan = SamplingPlan(solver, 3, "discrete", 1.0, to_zero=solver == "edm", dataset_name="emoji")
    before = net.calls, net.rows
    images(net, plan, [0], batch=1)
    assert (net.calls - before[0], net.rows - before[1]) == (plan.nfe().parallel_nfe, plan.nfe().nfe)
    assert plan.record()["forwards"] == 2 * plan.nfe().nfe


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
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 3]
    assert [line["prompt"] for line in lines] == [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    assert {line["file"] for line in lines} == {"000000/000000.png", "000000/000001.png", "000000/000003.png"}
    assert {(line["nfe"], line["parallel_nfe"], line["forwards"]) for line in lines} == {(6, 4, 12)}
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
    write_images(PLAN, seeds[:3], prompts[:3], tmp_path / "out", batch=4, device="cpu")
    first = pngs(tmp_path / "out")
    (tmp_path / "out" / image_name(0)).unlink()
    damaged = tmp_path / "out" / image_name(1)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    untouched = (tmp_path / "out" / image_name(2)).stat().st_mtime_ns
    write_images(PLAN, seeds, prompts, tmp_path / "out", batch=4, device="cpu")
    second = pngs(tmp_path / "out")
    assert {name: second[name] for name in first} == first
    assert image_name(3) in second
    assert (tmp_path / "out" / image_name(2)).stat().st_mtime_ns == untouched
    assert len((tmp_path / "out/manifest.jsonl").read_text().splitlines()) == 4


def test_interrupted_run_leaves_lines_that_the_next_one_uses(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=1, device="cpu")
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").unlink()
    (out / "manifest-rank0.jsonl").write_text(lines[0] + "\n" + lines[1][: len(lines[1]) // 2])  # cut off in mid-line
    kept = (out / image_name(0)).stat().st_mtime_ns
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=1, device="cpu")
    assert (out / image_name(0)).stat().st_mtime_ns == kept
    assert [json.loads(line)["seed"] for line in (out / "manifest.jsonl").read_text().splitlines()] == [0, 1]


def test_a_run_cut_off_before_its_manifest_needs_no_new_image(tmp_path):
    out = tmp_path / "out"
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu")
    (out / "manifest.jsonl").rename(out / "manifest-rank0.jsonl")
    before = pngs(out)
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu")
    assert pngs(out) == before
    assert [json.loads(line)["seed"] for line in (out / "manifest.jsonl").read_text().splitlines()] == [0, 1]
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
    flow = SamplingPlan("ddim", 3, "flowmatch", 1.0, dataset_name="emoji")
    with pytest.raises(UserError, match="flowmatch is for flow models"):
        write_images(flow, [0], PROMPTS[:1], out, batch=1, device="cpu", overwrite=True)
    assert (out / "manifest.jsonl").read_bytes() == whole
    (out / "manifest.jsonl").write_bytes(whole[:-9] + b"\xff\n")
    with pytest.raises(UserError, match="line 2 is damaged; use --overwrite"):
        write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")
    write_images(PLAN, [0, 1], PROMPTS[:2], out, batch=2, device="cpu", overwrite=True)
    assert (out / "manifest.jsonl").read_bytes() == whole


def test_two_runs_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with contextlib.ExitStack() as locks:
        Manifest(out, {}).open(locks)
        with pytest.raises(UserError, match="another process writes to"):
            write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")
    write_images(PLAN, [0], PROMPTS[:1], out, batch=1, device="cpu")


def test_a_multistep_table_samples_at_its_own_order():
    table = cold_start_table(4, 2)
    plans = [
        SamplingPlan.of_table(replace(table, sampler_stu="ipndm", max_order=order), None, "float32") for order in (1, 3)
    ]
    assert [(plan.solver, plan.options) for plan in plans] == [("epd_ipndm", {"max_order": n}) for n in (1, 3)]
    assert SamplingPlan.of_table(table, None, "float32").options == {}


def test_strange_pictures_are_not_mixed_in(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds pictures but no manifest"):
        write_images(PLAN, [0], PROMPTS[:1], tmp_path, batch=1, device="cpu")


BASE = ["--sampler", "ddim", "--dataset-name", "emoji", "--prompt-file", str(TEST_PROMPTS)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BASE, "--seeds", "0-5000"], "seed 1000 has no prompt: 1000 prompts serve seeds 0-999"),
        ([*BASE, "--seeds", "5-1"], "the range 5-1 runs backwards"),
        ([*BASE, "--max-order", "3"], "ddim takes no option max_order; it belongs to ipndm"),
        ([*BASE, "--num-steps", "1"], "num_steps must be at least 2"),
        ([*BASE, "--schedule-type", "cosine"], "unknown schedule type 'cosine'; use one of polynomial"),
        ([*BASE, "--schedule-rho", "-1"], "schedule_rho must be positive, got -1"),
        ([*BASE, "--sigma-min", "20", "--sigma-max", "3"], "need 0 < sigma_min < sigma_max, got sigma_min 20"),
        (["--sampler", "edm", *BASE[2:], "--s-churn", "nan"], "s_churn must be a finite number, got nan"),
        ([*BASE, "--prompt", "also this"], "one of the two"),
        ([*BASE[:4]], "one of the two"),
        ([*BASE, "--guidance-rate", "-3"], "guidance_rate -3.0 must be"),
        ([*BASE, "--model-path", "no/such/model"], "model folder no/such/model does not exist"),
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


def test_bad_predictors(tmp_path):
    truncated = tmp_path / "cut.pkl"
    truncated.write_bytes(b"\x80\x04\x95")
    for path, message in ((tmp_path / "missing.pkl", "missing.pkl"), (truncated, "cut.pkl")):
        result = run_cli(sample.main, "--predictor_path", str(path), "--prompt", "x", "--outdir", str(tmp_path / "out"))
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


def test_two_ranks_make_the_images_of_one(tmp_path):
    """Also: plain python with MASTER_PORT set starts no process group."""
    common = [
        "--prompt-file",
        str(TEST_PROMPTS),
        "--seeds",
        "0-4",
        "--batch",
        "2",
        "--predictor_path",
        str(start_table(tmp_path)),
    ]
    environment = os.environ | {"MASTER_PORT": "29600"}
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]}
    processes = [
        subprocess.Popen(
            [sys.executable, *launcher, "sample.py", *common, "--outdir", str(tmp_path / name)],
            cwd=ROOT,
            env=environment,
        )
        for name, launcher in launchers.items()
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    for seed in range(5):
        one, two = (load_image(tmp_path / name / image_name(seed)) for name in launchers)
        assert ((one - two) * 255).abs().max() <= 1
    manifests = [[json.loads(line) for line in (tmp_path / name / "manifest.jsonl").open()] for name in launchers]
    assert [(line["seed"], line["prompt"]) for line in manifests[0]] == [
        (line["seed"], line["prompt"]) for line in manifests[1]
    ]
