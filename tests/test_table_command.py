"""`python -m training.table`: what it prints of tables and of pairs of them, and with which exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_scoring import refused
from test_table import PUBLISHED, random_table

from solver_utils import get_schedule
from training.denoisers import BACKBONES
from training.denoisers.stable_diffusion import read_noise
from training.table import load_table, save_table
from training.table_command import main
from training.table_facts import table_cost, table_sigmas

REPOSITORY = Path(__file__).resolve().parents[1]
RANGE = {"dataset_name": "elsewhere", "schedule_type": "logsnr", "sigma_min": 0.25, "sigma_max": 4.0}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def path(tmp_path):
    table = random_table(0, rows=4, points=3, guidance_rate=3.0, **RANGE)
    save_table(table, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def changed(path, name, **fields):
    other = path.with_name(name)
    save_table(replace(load_table(path), **fields), other)
    return other


# --- show ---


def test_show_prints_every_number_and_all_metadata(path):
    result = run("show", path)
    assert result.exit_code == 0 and result.stderr == ""
    table = load_table(path)
    head, points = result.stdout.split("\n\n")
    for name, value in table.metadata().items():
        text = value if isinstance(value, str) else json.dumps(value)
        assert any(line.split(maxsplit=1) == [name, text] for line in head.splitlines()), name
    assert table.sha256() in head and "nfe 16, parallel_nfe 8, forwards 32" in head
    lines = [line.split() for line in points.splitlines()]
    heading = "interval from sigma to sigma point at sigma position weight scale_dir scale_time"
    assert " ".join(lines[0]) == heading
    assert len(lines) == 1 + 4 * 3 and len(set(map(len, points.splitlines()))) == 1
    for line in lines[1:]:
        i, k = int(line[0]), int(line[3])
        start, end = 4.0 ** (1 - i / 2), 4.0 ** (1 - (i + 1) / 2)  # logsnr: equal ratios
        assert [float(line[1]), float(line[2])] == pytest.approx([start, end], rel=1e-4)
        position = table.positions[i, k].item()
        assert float(line[4]) == pytest.approx(end**position * start ** (1 - position), rel=1e-4)
        arrays = (table.positions, table.weights, table.scale_dir, table.scale_time)
        assert line[5:] == [f"{array[i, k]:.6f}" for array in arrays]


def test_show_json_holds_the_table(path):
    other = changed(path, "b.json", guidance_rate=1.0)
    result = run("show", path, other, "--json")
    first, second = map(json.loads, result.stdout.splitlines())
    table = load_table(path)
    assert first["positions"] == table.positions.tolist() and first["sha256"] == table.sha256()
    assert first["file"] == str(path) and first["nfe"] == 16
    assert (first["forwards"], second["forwards"]) == (32, 16)
    assert first["sigmas"] == pytest.approx([4, 2, 1, 0.5, 0.25])


@pytest.mark.parametrize(("stu", "points"), [("epd", 1), ("ipndm", 2), ("dpmpp", 3)])
def test_costs_of_every_solver(stu, points):
    cost = table_cost(random_table(0, 5, points, sampler_stu=stu, afs=True))
    assert (cost.nfe, cost.parallel_nfe, cost.forwards) == (5 * (1 + points) - 1, 9, 2 * (5 * (1 + points) - 1))


@pytest.mark.parametrize("schedule", ["discrete", "logsnr", "time_uniform", "polynomial"])
def test_sigmas_left_to_the_backbone_are_its_own(schedule):
    table = random_table(0, 5, 2, dataset_name="emoji", schedule_type=schedule)
    noise = read_noise(BACKBONES["emoji"].configs)
    wanted = get_schedule(6, 0.1, noise.sigma(torch.ones(())).item(), None, schedule, 1.0, noise)
    assert table_sigmas(table) == wanted.tolist()


@pytest.mark.parametrize(
    "metadata",
    [
        {"dataset_name": "elsewhere"},
        {**RANGE, "schedule_type": "discrete"},
        {**RANGE, "schedule_type": "flowmatch"},
        {**RANGE, "schedule_type": "unheard-of"},
    ],
)
def test_sigmas_that_only_the_model_knows_are_left_out(metadata, tmp_path):
    table = random_table(0, 2, 2, **metadata)
    assert table_sigmas(table) is None
    save_table(table, tmp_path / "a.json")
    result = run("show", tmp_path / "a.json")
    assert result.exit_code == 0 and "from sigma" not in result.stdout
    assert len(result.stdout.split("\n\n")[1].splitlines()) == 1 + 4


def test_sigmas_of_a_flow_follow_the_shift():
    shift = {**RANGE, "sigma_min": 0.1, "sigma_max": 1.0, "schedule_type": "flowmatch", "flowmatch_shift": 3.0}
    wanted = get_schedule(3, 0.1, 1.0, None, "flowmatch", 1.0, shift=3.0)
    assert table_sigmas(random_table(0, 2, 2, **shift)) == wanted.tolist()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not here")
def test_published_tables_print():
    files = sorted(PUBLISHED.glob("*.pkl"))
    assert len(files) == 11
    result = run("show", *files)
    assert result.exit_code == 0, result.output
    for file in files:
        assert str(file) in result.stdout
    assert result.stdout.count("interval ") == 11
    differing = run("diff", PUBLISHED / "sd15-start.pkl", PUBLISHED / "sd15-best.pkl")
    assert differing.exit_code == 1 and "positions: 20 differ" in differing.stdout


# --- diff ---


def test_diff_of_equals_is_0(path):
    same = changed(path, "b.json")
    result = run("diff", path, same)
    assert result.exit_code == 0 and "the same numbers and the same metadata" in result.stdout
    found = json.loads(run("diff", path, same, "--json").stdout)
    assert found == {"a": str(path), "b": str(same), "same": True, "metadata": {}, "arrays": {}}


def test_diff_names_what_differs(path):
    weights = load_table(path).weights.clone()
    weights[2, 0] += 0.01
    weights[2, 1] -= 0.01
    scale = load_table(path).scale_dir.clone()
    scale[0, 2] += 0.5
    other = changed(path, "b.safetensors", weights=weights, scale_dir=scale, guidance_rate=7.5)
    result = run("diff", path, other)
    assert result.exit_code == 1
    assert "guidance_rate  3.0  7.5" in result.stdout and "weights: 2 differ, by 0.01 at most" in result.stdout
    assert "scale_dir: 1 differ, by 0.5 at most" in result.stdout and "positions" not in result.stdout
    found = json.loads(run("diff", path, other, "--json").stdout)
    assert found["metadata"] == {"guidance_rate": [3.0, 7.5]}
    assert found["arrays"].keys() == {"weights", "scale_dir"}
    assert [point[:2] for point in found["arrays"]["weights"]["points"]] in ([[2, 0], [2, 1]], [[2, 1], [2, 0]])
    ((row, point, a, b),) = found["arrays"]["scale_dir"]["points"]
    assert (row, point) == (0, 2) and b - a == pytest.approx(0.5)


def test_diff_forgives_a_tolerance(path):
    plain = random_table(1, rows=4, points=3, scales=False, **RANGE)
    save_table(plain, path.with_name("c.json"))
    save_table(plain, path.with_name("c.pkl"))
    pair = path.with_name("c.json"), path.with_name("c.pkl")
    assert run("diff", *pair).exit_code == 1
    assert run("diff", *pair, "--tolerance", "1e-6").exit_code == 0


def test_diff_of_other_shapes(path, tmp_path):
    save_table(random_table(0, rows=5, points=3, guidance_rate=3.0, **RANGE), tmp_path / "longer.json")
    result = run("diff", path, tmp_path / "longer.json")
    assert result.exit_code == 1
    assert "num_steps  5  6" in result.stdout and "cannot be compared" in result.stdout


def test_trouble_is_exit_code_2(path, tmp_path):
    refused(run("diff", path, tmp_path / "none.json"), "there is no such file")
    refused(run("show", path, tmp_path / "none.json"), "there is no such file")
    (tmp_path / "bad.json").write_text("{}")
    refused(run("diff", tmp_path / "bad.json", path), "is not a solver table")
    assert run("show").exit_code == 2 and run("diff", path).exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["show", "--help"], ["diff", "--help"]])
def test_help_is_quick_and_named_after_the_module(arguments):
    started = time.perf_counter()
    command = [sys.executable, "-m", "training.table", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("Usage: python -m training.table")
    assert time.perf_counter() - started < 2


def test_the_module_runs_as_a_program(path):
    command = [sys.executable, "-m", "training.table", "show", path]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout == run("show", path).stdout
