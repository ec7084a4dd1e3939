"""The benchmark of the solvers: a small run of every part that needs no GPU, and the judgement of what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.autograd import DeviceType

from benchmarks import solver_report
from benchmarks.closed_form import MixtureDenoiser, gaussian_solution, reference_solution
from benchmarks.plots import save_plot, twins
from benchmarks.solver_errors import CLOSED_FORM_BATCH, CLOSED_FORM_RANGE, relative_error
from benchmarks.solver_speed import WatchedNet
from benchmarks.solver_sync import LOOP, count_syncs, profiled_syncs
from benchmarks.solvers import main
from benchmarks.variants import VARIANTS, CountError, Variant, run_counted, select_variants
from solver_utils import SOLVER_OPTIONS, get_schedule
from solvers import SOLVERS

SMALL = ["--images", "1", "--reference-steps", "4", "--nodes", "2", "--repeats", "1", "--device", "cpu"]
SMALL += ["--solvers", "ddim,epd", "--nfe", "2,4", "--batches", "1,2"]
LABELS = ["ddim", "epd"]


def bench(outdir, *arguments):
    return CliRunner().invoke(main, [*arguments, "--outdir", str(outdir)])


def read(outdir):
    def refuse(name):
        raise ValueError(f"{name} in the file")

    return json.loads((outdir / "solvers.json").read_text(), parse_constant=refuse)["parts"]


def errors(part, problem, variant):
    return [row["error"] for row in part["rows"] if (row["problem"], row["variant"]) == (problem, variant)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    outdir = tmp_path_factory.mktemp("benchmark")
    result = bench(outdir, *SMALL)
    assert result.exit_code == 0, result.output
    return SimpleNamespace(outdir=outdir, output=result.output, parts=read(outdir))


@pytest.fixture(scope="module")
def closed_form(tmp_path_factory):
    """Every variant on the closed form."""
    outdir = tmp_path_factory.mktemp("closed_form")
    assert bench(outdir, "--parts", "closed-form", "--nfe", "8,24").exit_code == 0
    return read(outdir)["closed_form"]


# ----------------------------------------------------------------------------
# A run.


def test_a_run_writes_every_part(run):
    assert set(run.parts) == {"closed_form", "embedded", "overhead_cpu"}
    assert "sync skipped" in run.output
    for part in run.parts.values():
        assert part["machine"]["cpu"] and part["machine"]["torch"] == torch.__version__
        assert part["command"].startswith("python -m benchmarks.solvers")
        assert list(dict.fromkeys(row["variant"] for row in part["rows"])) == LABELS
    assert (run.outdir / "solvers.png").stat().st_size < 300_000
    assert not list(run.outdir.glob(".*.tmp"))


def test_embedded_rows(run):
    part = run.parts["embedded"]
    assert set(part["references"]) == {"discrete", "logsnr"}
    for problem, reference in part["references"].items():
        assert 0 < reference["reference_error"] < 10
        assert [len(errors(part, problem, label)) for label in LABELS] == [2, 2]
        assert errors(part, problem, "ddim")[1] == 0  # 4 intervals are the truth of this run
    others = [row for row in part["rows"] if (row["variant"], row["parallel_nfe"]) != ("ddim", 4)]
    assert all(1e-3 < row["error"] < 100 and 1e-3 < row["error_to_limit"] < 100 for row in others)
    assert all(-1 < row["reward"] < 1 and -1 < row["heldout"] < 1 for row in part["rows"])
    assert {row["error_ci95"] for row in part["rows"]} == {None}  # one image has no interval
    assert part["settings"]["tf32"] is False


def test_overhead_rows(run):
    rows = run.parts["overhead_cpu"]["rows"]
    assert {(row["variant"], row["batch"]) for row in rows} == {(label, batch) for label in LABELS for batch in (1, 2)}
    assert all(0 < row["fraction"] < 1 and row["outside_us_per_step"] > 0 for row in rows)


def test_tables(run):
    text = (run.outdir / "solvers.md").read_text()
    for heading in ("Mixture of Gaussians", "Embedded model", "Time around the network calls, CPU"):
        assert f"## {heading}" in text
    assert text == solver_report.to_markdown(run.parts)
    assert text.count("| epd |") == 4
    rewards = {row["variant"]: row["reward"] for row in run.parts["embedded"]["rows"] if row["problem"] == "logsnr"}
    assert solver_report.number(rewards["epd"]) in text.split("Mean reward")[1].split("##")[0]


def test_parts_are_replaced_one_by_one(run):
    stamp = (run.outdir / "solvers.json").read_text()
    assert bench(run.outdir, *SMALL).exit_code == 0  # nothing is missing
    assert read(run.outdir)["overhead_cpu"]["rows"] == run.parts["overhead_cpu"]["rows"]
    arguments = [*SMALL, "--parts", "overhead", "--solvers", "ddim", "--overwrite"]
    assert bench(run.outdir, *arguments).exit_code == 0
    parts = read(run.outdir)
    assert [row["variant"] for row in parts["overhead_cpu"]["rows"]] == ["ddim", "ddim"]
    assert parts["closed_form"] == run.parts["closed_form"] and parts["embedded"] == run.parts["embedded"]
    (run.outdir / "solvers.json").write_text(stamp)


def test_rows_that_are_there_are_kept(tmp_path):
    arguments = ["--parts", "closed-form", "--solvers", "ddim"]
    assert bench(tmp_path, *arguments, "--nfe", "4").exit_code == 0
    content = (tmp_path / "solvers.json").read_text()
    value = str(errors(read(tmp_path)["closed_form"], "logsnr", "ddim")[0])
    (tmp_path / "solvers.json").write_text(content.replace(value, "0.125"))
    assert bench(tmp_path, *arguments, "--nfe", "4,8").exit_code == 0
    found = errors(read(tmp_path)["closed_form"], "logsnr", "ddim")
    assert found[0] == 0.125 and 0 < found[1] < 0.125
    other = content.replace('"batch": 8', '"batch": 9')
    (tmp_path / "solvers.json").write_text(other)
    refused = bench(tmp_path, *arguments, "--nfe", "8")
    assert refused.exit_code == 2 and "the part closed_form with another settings" in refused.output
    assert (tmp_path / "solvers.json").read_text() == other
    assert bench(tmp_path, *arguments, "--nfe", "8", "--overwrite").exit_code == 0
    assert len(errors(read(tmp_path)["closed_form"], "logsnr", "ddim")) == 1


# ----------------------------------------------------------------------------
# The figures.


def test_variants_cover_every_solver_and_labels_are_unique():
    assert {variant.solver for variant in VARIANTS} == set(SOLVERS)
    assert len({variant.label for variant in VARIANTS}) == len(VARIANTS)
    assert [variant.label for variant in select_variants(["ddim", "heun"])] == ["ddim", "heun"]


def test_errors_fall_with_the_number_of_calls(closed_form):
    for problem in ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch"):
        assert closed_form["references"][problem]["reference_error"] < 1e-8
        for variant in VARIANTS:
            few, many = errors(closed_form, problem, variant.label)
            assert 1e-6 < many < few / 1.5, (problem, variant.label)
    assert errors(closed_form, "logsnr", "edm") == errors(closed_form, "logsnr", "heun")


def test_an_error_computed_independently(closed_form):
    low, high = CLOSED_FORM_RANGE
    net = MixtureDenoiser()
    x = net.start(CLOSED_FORM_BATCH, high)
    truth = reference_solution(net, x, high, low, steps=400)
    nodes = [high * (low / high) ** (i / 8) for i in range(9)]
    for t, u in pairwise(nodes):
        x = x + (u - t) * net.slope(x, torch.tensor(t, dtype=torch.float64))
    expected = [((a - b).norm() / b.norm()).item() for a, b in zip(x, truth, strict=True)]
    assert errors(closed_form, "logsnr", "ddim")[0] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_relative_error_is_zero_for_the_exact_solution():
    net = MixtureDenoiser(components=1)
    x = net.start(2, 10.0)
    exact = gaussian_solution(net, x, 10.0, 0.05)
    assert relative_error(reference_solution(net, x, 10.0, 0.05, steps=400), exact).max() < 1e-9
    assert relative_error(2 * exact, exact).tolist() == pytest.approx([1, 1])


class LyingNet(MixtureDenoiser):
    """Counts one call in two, or all calls with one row too many."""

    def __init__(self, lie):
        super().__init__()
        self.lie = lie

    def slope(self, x, sigma, cond=None):
        slope = super().slope(x, sigma, cond)
        if self.lie == "rows":
            self.rows += 1
        elif self.calls % 2:
            self.calls -= 1
        return slope


@pytest.mark.parametrize("lie", ["rows", "calls"])
@pytest.mark.parametrize("label", ["ddim", "heun", "epd"])
def test_a_wrong_count_is_loud(label, lie):
    variant = next(variant for variant in VARIANTS if variant.label == label)
    sigmas = get_schedule(6, *CLOSED_FORM_RANGE)
    net = MixtureDenoiser()
    run_counted(variant, net, net.start(2, 10.0), sigmas)
    with pytest.raises(CountError, match=f"{label} over 6 nodes made"):
        run_counted(variant, LyingNet(lie), net.start(2, 10.0), sigmas)


def test_a_number_of_calls_that_cannot_be_spent_is_skipped():
    nodes = {variant.label: variant.num_steps(10) for variant in VARIANTS}
    assert (nodes["ddim"], nodes["heun"], nodes["epd"], nodes["dpm, 2 inner"]) == (11, 6, 6, None)
    for variant in VARIANTS:
        if nodes[variant.label]:
            assert variant.cost(nodes[variant.label]).parallel_nfe == 10
            assert ("table" in variant.sampler(3).keywords) == ("table" in SOLVER_OPTIONS[variant.solver])


# ----------------------------------------------------------------------------
# Waits for a GPU.


def event(name, start, end=None, device=DeviceType.CPU):
    time_range = SimpleNamespace(start=start, end=start + 1 if end is None else end)
    return SimpleNamespace(name=name, time_range=time_range, device_type=device)


def test_waits_are_counted_where_they_happen():
    events = [
        event(LOOP, 100, 200),
        event("after the loop", 201, 220),
        event("network call", 110, 150),
        event("cudaDeviceSynchronize", 99),  # before the loop
        event("cudaDeviceSynchronize", 202),  # behind it
        event("cudaMemcpyAsync", 120),
        event("cudaLaunchKernel", 121),
        event("aten::item", 130),
        event("cudaStreamSynchronize", 160),
        event("Memcpy DtoH (Device -> Pageable)", 210, device=DeviceType.CUDA),  # asked for in the loop
        event("Memcpy DtoD (Device -> Device)", 170, device=DeviceType.CUDA),
        event(LOOP, 105, 190, DeviceType.CUDA),
    ]
    expected = {"solver": {"Memcpy DtoH": 1, "cudaStreamSynchronize": 1}, "network": {"aten::item": 1}}
    assert count_syncs(events) == expected


@pytest.mark.parametrize("label", [variant.label for variant in VARIANTS])
def test_no_solver_reads_a_number_in_its_loop(label):
    """`aten::item` is what makes the host wait on a GPU; a profile on the CPU shows it too."""
    variant = next(variant for variant in VARIANTS if variant.label == label)
    net = MixtureDenoiser()
    net.device = torch.device("cpu")
    inputs = net.start(2, 10.0), get_schedule(5, *CLOSED_FORM_RANGE), None
    assert profiled_syncs(variant, net, inputs) == {"solver": {}, "network": {}}


def test_a_planted_read_is_found():
    def waiting(net, x, sigma, cond):
        return net.slope(x, sigma, cond) * (1 if sigma.item() > 0 else 0)

    net = MixtureDenoiser()
    net.device = torch.device("cpu")
    inputs = net.start(2, 10.0), get_schedule(5, *CLOSED_FORM_RANGE), None
    found = profiled_syncs(Variant("ddim", "ddim"), WatchedNet(net, waiting), inputs)
    assert found["solver"] == {} and found["network"]["aten::item"] == 4


# ----------------------------------------------------------------------------
# Verdicts, plot, mistakes.


def test_check_judges_what_was_measured(tmp_path, run):
    def verdict(fraction):
        part = run.parts["overhead_cpu"]
        rows = [row | {"fraction": fraction} for row in part["rows"]]
        content = {"format": 1, "parts": run.parts | {"overhead_cpu": part | {"rows": rows}}}
        (tmp_path / "solvers.json").write_text(json.dumps(content))
        return bench(tmp_path, "--parts", "none", "--check")

    good, bad = verdict(0.029), verdict(0.031)
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "limit of 3% holds" in good.output and "BROKEN" in bad.output


def test_figures_of_other_code_are_not_judged(tmp_path, run):
    part = run.parts["overhead_cpu"] | {"solver_code": "another"}
    (tmp_path / "solvers.json").write_text(json.dumps({"format": 1, "parts": {"overhead_cpu": part}}))
    result = bench(tmp_path, "--parts", "none", "--check")
    assert result.exit_code == 2 and "overhead_cpu was measured with other code" in result.output


def test_one_wait_breaks_the_promise():
    row = {"variant": "ddim", "syncs": 0, "debug_mode": None, "solver_events": {}, "network_events": {}}
    assert solver_report.verdicts({"sync": {"rows": [row]}}) == [
        (True, "waiting for the GPU in no solver's loop: holds")
    ]
    for fault in ({"syncs": 1}, {"debug_mode": "called a synchronizing CUDA operation"}):
        [(holds, sentence)] = solver_report.verdicts({"sync": {"rows": [row | fault]}})
        assert not holds and "ddim: BROKEN" in sentence


def test_equal_lines_are_drawn_once():
    panels = [{"heun": {4: 1.0, 8: 0.5}, "edm": {4: 1.0, 8: 0.5}, "dpm": {8: 0.5}}, {"heun": {4: 2.0}, "edm": {4: 2.0}}]
    assert twins(panels) == {"heun": "heun", "edm": "heun", "dpm": "dpm"}
    panels[1]["edm"][4] = 2.1
    assert twins(panels)["edm"] == "edm"


def test_what_diverged_is_said_and_not_drawn(tmp_path, closed_form):
    rows = [row | {"error": None if row["variant"] == "dpmpp 3" else row["error"]} for row in closed_form["rows"]]
    part = closed_form | {"rows": rows}
    assert "| dpmpp 3 | diverged |" in solver_report.to_markdown({"closed_form": part})
    save_plot({"closed_form": part}, tmp_path / "solvers.png")
    assert (tmp_path / "solvers.png").stat().st_size < 300_000
    part = closed_form | {"rows": [row | {"error": None} for row in closed_form["rows"]]}
    assert "**" not in solver_report.to_markdown({"closed_form": part})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "speed"], "unknown name 'speed'"),
        (["--nfe", "4,many"], "cannot read '4,many'"),
        (["--nfe", "0"], "--nfe: 0 is not positive"),
        (["--batches", "-1"], "--batches: -1 is not positive"),
        (["--solvers", "euler"], "unknown solver 'euler'"),
        (["--parts", "none", "--check"], "neither overhead on the CPU nor sync"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    result = bench(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]


@pytest.mark.parametrize("content", ["no json", "[]", '{"format": 2, "parts": {}}'])
def test_another_file_of_that_name_is_left_alone(tmp_path, content):
    (tmp_path / "solvers.json").write_text(content)
    assert bench(tmp_path, "--parts", "none").exit_code == 2
    assert (tmp_path / "solvers.json").read_text() == content


def test_help_needs_no_torch():
    code = "import sys, benchmarks.solvers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
