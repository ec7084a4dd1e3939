"""fake_train.py as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import fake_train
from solver_utils import SCHEDULE_TYPES, default_rho
from training.table import load_table

ROOT = Path(fake_train.__file__).parent
BASE = ["--num-steps", "11", "--num-points", "2"]


def run(*arguments: object):
    return CliRunner().invoke(fake_train.main, [*BASE, *map(str, arguments)])


def test_the_documented_command(tmp_path):
    outdir = tmp_path / "exps" / "99999-ms_coco-11-20-epd-dpm-1-discrete"
    result = run("--outdir", outdir, "--snapshot-step", 99999)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in outdir.iterdir()) == ["network-snapshot-099999.pkl", "training_options.json"]
    table = load_table(outdir / "network-snapshot-099999.pkl")
    assert table.positions.tolist() == [[pytest.approx(0.335, abs=1e-7), pytest.approx(0.665, abs=1e-7)]] * 10
    assert table.weights.tolist() == [[0.5, 0.5]] * 10
    assert (table.guidance_rate, table.schedule_type, table.schedule_rho, table.afs) == (7.5, "discrete", 1.0, False)
    options = json.loads((outdir / "training_options.json").read_text())
    assert {key: options[key] for key in table.to_dict()} == table.to_dict()
    assert options["table_sha256"] == table.sha256()
    printed = json.loads(result.stdout)
    assert {key: printed[key] for key in table.metadata()} == table.metadata()
    assert (printed["r_base"], printed["r_epsilon"], printed["snapshot_step"]) == (0.5, 0.33, 99999)


def test_every_option_reaches_the_table(tmp_path):
    result = run(
        *("--outdir", tmp_path, "--r-base", 0.4, "--r-epsilon", 0.2, "--scale-dir", 0.3, "--scale-time", 0.1),
        *("--dataset-name", "emoji", "--guidance-type", "cfg", "--guidance-rate", 3, "--schedule-type", "polynomial"),
        *("--sigma-min", 0.02, "--sigma-max", 80, "--afs"),
    )
    assert result.exit_code == 0, result.output
    table = load_table(tmp_path / "network-snapshot-000000.pkl")
    assert table.positions[0].tolist() == pytest.approx([0.3, 0.5], abs=1e-7)
    assert (table.scale_dir_range, table.scale_time_range) == (0.3, 0.1)
    assert bool((table.scale_dir == 1).all()) and bool((table.scale_time == 1).all())
    assert (table.dataset_name, table.guidance_rate, table.schedule_type, table.schedule_rho) == (
        "emoji",
        3,
        "polynomial",
        7,
    )
    assert (table.sigma_min, table.sigma_max, table.afs) == (0.02, 80, True)


@pytest.mark.parametrize(
    ("arguments", "sampler_stu", "max_order"),
    [
        ([], "epd", 2),
        (["--sampler-stu", "ipndm"], "ipndm", 2),
        (["--sampler-stu", "ipndm", "--max-order", 4], "ipndm", 4),
        (["--sampler-stu", "dpmpp", "--max-order", 1], "dpmpp", 1),
        (["--sampler-stu", "dpmpp", "--max-order", 3], "dpmpp", 3),
    ],
)
def test_the_solver_of_the_table_comes_back_from_the_pkl(tmp_path, arguments, sampler_stu, max_order):
    result = run("--outdir", tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    table = load_table(tmp_path / "network-snapshot-000000.pkl")
    assert (table.sampler_stu, table.max_order, table.lower_order_final) == (sampler_stu, max_order, True)
    printed = json.loads(result.stdout)
    assert (printed["sampler_stu"], printed["max_order"]) == (sampler_stu, max_order)


def test_dry_run_writes_nothing(tmp_path):
    result = run("--outdir", tmp_path / "new", "--dry-run", "--afs", "false")
    assert result.exit_code == 0 and json.loads(result.stdout)["num_steps"] == 11
    assert list(tmp_path.iterdir()) == []


def test_existing_files_stay_unless_overwrite_is_given(tmp_path):
    assert run("--outdir", tmp_path).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("--outdir", tmp_path, "--r-base", 0.4)
    assert result.exit_code == 2 and "network-snapshot-000000.pkl" in result.stderr and "--overwrite" in result.stderr
    other_step = run("--outdir", tmp_path, "--snapshot-step", 7)
    assert other_step.exit_code == 2 and "training_options.json" in other_step.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run("--outdir", tmp_path, "--r-base", 0.4, "--overwrite").exit_code == 0
    table = load_table(tmp_path / "network-snapshot-000000.pkl")
    assert table.positions[0].tolist() == pytest.approx([0.235, 0.565], abs=1e-7)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--num-steps", 1], "--num-steps"),
        (["--num-points", 0], "--num-points"),
        (["--snapshot-step", -1], "--snapshot-step"),
        (["--r-epsilon", 1.2], "r_epsilon"),
        (["--r-base", "nan"], "r_base"),
        (["--r-base", 1], "r_base"),
        (["--scale-dir", -0.1], "scale_dir_range"),
        (["--guidance-rate", "inf"], "guidance_rate"),
        (["--guidance-rate", "much"], "--guidance-rate"),
        (["--schedule-type", "linear"], "--schedule-type"),
        (["--schedule-rho", 0], "schedule_rho"),
        (["--sigma-min", 3, "--sigma-max", 2], "sigma_max"),
        (["--dataset-name", ""], "dataset_name"),
        (["--afs", "perhaps"], "--afs"),
        (["--unknown", 1], "--unknown"),
        (["--sampler-stu", "heun"], "'heun' is not one of 'epd', 'ipndm', 'dpmpp'"),
        (["--max-order", 2], "epd takes no --max-order; it belongs to --sampler-stu ipndm or dpmpp"),
        (["--sampler-stu", "ipndm", "--max-order", 5], "max_order is 5; ipndm has orders 1 to 4"),
        (["--sampler-stu", "dpmpp", "--max-order", 4], "max_order is 4; dpmpp has orders 1 to 3"),
        (["--sampler-stu", "dpmpp", "--max-order", 0], "max_order is 0; it must be at least 1"),
    ],
)
@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_bad_values_give_one_line_and_exit_code_2(tmp_path, arguments, word, dry_run):
    result = run("--outdir", tmp_path / "new", *arguments, *dry_run)
    assert result.exit_code == 2 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and lines[0] == result.stderr.splitlines()[-1] and word in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_an_outdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for outdir in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run("--outdir", outdir)
        assert result.exit_code == 2 and "Error: " in result.stderr and "file" in result.stderr


def test_schedule_facts_match_solver_utils():
    assert set(fake_train.SCHEDULE_TYPES) == set(SCHEDULE_TYPES)
    assert all(fake_train.resolve_rho(name, None) == default_rho(name) for name in SCHEDULE_TYPES)
    assert fake_train.resolve_rho("polynomial", 3.0) == 3.0


def test_every_option_is_explained():
    context = fake_train.main.make_context("fake_train.py", [*BASE])
    for option in fake_train.main.params:
        _, text = option.get_help_record(context)
        assert option.help and (option.is_flag or "default: " in text or "required" in text), option.name


@pytest.mark.parametrize("arguments", [["--help"], [*BASE, "--dry-run"]])
def test_help_and_dry_run_do_not_wait_for_torch(tmp_path, arguments):
    code = f"import sys; sys.argv = ['fake_train.py', *{arguments!r}]; import runpy, atexit\n"
    code += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    code += f"runpy.run_path({str(ROOT / 'fake_train.py')!r}, run_name='__main__')"
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0 and result.stderr.strip() == "False"
    assert time.perf_counter() - started < 2
