"""docs/differences.md: its figures are recomputed, what it says of this project's options is tried, its names exist."""

from __future__ import annotations

import ast
import importlib
import json
import pickletools
import re
import shlex
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from test_table import PUBLISHED
from toy_training import run_toy, write_files

from benchmarks.learning_curves import by_line, failed, find_gap, reached, shifted
from benchmarks.learning_lines import REFERENCE
from solver_utils import count_nfe
from torch_utils.checkpoint import CheckpointError, load_checkpoint
from training.images import quantize
from training.ppo.cold_start import SPREAD
from training.ppo.config import PUBLISHED_TRANSFORMS, Config, flatten, load_config
from training.ppo.inputs import start_table
from training.ppo.losses import advantages, legacy_mixed_groups

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "differences.md").read_text(encoding="utf-8")
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not here")


def table(after: str) -> list[list[str]]:
    """The cells of the first table after this text, without its head."""
    lines = PAGE[PAGE.index(after) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def spans(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


def prose() -> str:
    """The page with line breaks as spaces."""
    return " ".join(PAGE.split())


# ----------------------------------------------------------------------------
# Names.


def test_every_test_that_is_named_exists():
    paired = re.findall(r"`(test_\w+\.py)`:((?:,?\s*`test_\w+`)+)", PAGE)
    names = [(file, name) for file, listed in paired for name in spans(listed)]
    assert len(names) == len(re.findall(r"`test_\w+`", PAGE)) > 30  # none stands without its file
    for file, name in names:
        (path,) = (folder / file for folder in (ROOT / "tests", ROOT / "tests/reliability") if (folder / file).exists())
        assert f"def {name}(" in path.read_text(encoding="utf-8"), f"{file} has no {name}"


# ----------------------------------------------------------------------------
# Figures.


def test_counts():
    rows = table("\n**Counting.**")
    assert len(rows) == 4
    for solver, nodes, name, *counts in rows:
        (solver_name, *_), nodes = spans(solver), int(nodes)
        found = count_nfe(solver_name, nodes, num_points=2, to_zero=solver_name == "edm")
        assert [int(count) for count in counts] == [found.nfe, found.forwards, found.parallel_nfe]
        # The published formulas: sample.py's of intervals, sample_baseline.py's of nodes, both doubled for guidance.
        published = f"nfe{4 * (nodes - 1)}_npoints_2" if solver_name == "epd" else f"nfe{2 * nodes}"
        assert spans(name) == [published]


def test_analytical_first_slope():
    intervals, inner_steps = 4, 3
    assert f"{intervals} intervals of {inner_steps} steps" in PAGE
    plain, afs = (count_nfe("dpm", intervals + 1, inner_steps=inner_steps, afs=afs).nfe for afs in (False, True))
    assert f": {plain - intervals} evaluations for" in PAGE and f"only the very first: {afs} |" in PAGE


def test_advantages():
    rewards, prompt, mixed = (numbers(" ".join(cells[1:])) for cells in table("\n**Advantages.**"))
    scores = torch.tensor(rewards, dtype=torch.float64)
    for stated, groups in ((prompt, torch.arange(8) // 4), (mixed, legacy_mixed_groups(8, 4))):
        assert stated == pytest.approx(advantages(scores, groups, normalize=False).tolist(), abs=0.005)
    assert (torch.tensor(mixed).sign() == torch.tensor([1.0] * 4 + [-1.0] * 4)).all()


def test_pixels():
    """Published rewards saw floor(255 (x + 1) / 2) of what was saved as floor(127.5 x + 128)."""
    values = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    apart = (quantize(values.float()).double() * 255).round() - (255 * (values + 1) / 2).floor()
    (levels,) = re.findall(r"half of all values are a level apart, ([\d.]+) levels in the mean", PAGE)
    assert float(levels) == pytest.approx(apart.mean().item(), abs=0.005)
    assert (apart == 1).double().mean().item() == pytest.approx(0.5, abs=0.005)


def test_single_figures():
    (shift,) = re.findall(r"authors' score \+ ([\d.]+) \(three", PAGE)
    assert float(shift) == pytest.approx(PUBLISHED_TRANSFORMS["imagereward"][0], abs=5e-5)

    metrics = (DOCS / "metrics.md").read_text(encoding="utf-8").partition("## Parity with the original packages")[2]
    parity = re.findall(r"^\| `\w+` \|.* ([\d.e-]+) \|$", metrics, re.MULTILINE)
    (stated,) = re.findall(r"at most ([\d.e-]+) from the original packages", PAGE)
    assert len(parity) == 5 and float(stated) == max(map(float, parity))

    solvers = json.loads((DOCS / "solvers.json").read_text())["parts"]["embedded"]["rows"]
    errors = re.findall(r"order 4 errs ([\d.]+) where 2 errs ([\d.]+)", PAGE)[0]
    for order, stated in zip((4, 2), errors, strict=True):
        (error,) = (
            row["error"]
            for row in solvers
            if (row["problem"], row["solver"], row["parallel_nfe"]) == ("discrete", "ipndm", 10)
            and row["options"] == {"max_order": order}
        )
        assert float(stated) == pytest.approx(error, abs=0.005)


def test_learning():
    parts = json.loads((DOCS / "learning.json").read_text())["parts"]
    published, ours = (cells[1:] for cells in table("\n**Learning**"))
    starts = []
    for column, setting in enumerate("abcde"):
        gap, lines = find_gap(parts, setting), by_line(parts[f"curves_{setting}"]["rows"])
        for cells, line in ((published, "reference"), (ours, "rdpo")):
            rows = lines[line, "cold"]
            images = reached(rows, gap.target(0.9))
            said = "never" if images is None else f"{images[0]:,.0f}"
            assert cells[column] == f"{said}, {failed(rows, gap)} of {len(rows)}"
            assert max(row["curve"][-1][0] for row in rows) == (2048 if setting == "a" else 1024)
        distilled = lines["rdpo", "distilled"]
        starts.append(distilled[0]["start_images"])
        assert reached(distilled, gap.target(0.9))[0] == shifted(distilled[0])[0][0] == starts[-1]
    assert f"{min(starts):.0f} to {max(starts):.0f} images" in prose()


def test_speed():
    figures = json.loads((DOCS / "sd15.json").read_text())["parts"]
    measured = {row["figure"]: row["value"] for part in figures.values() for row in part["rows"]}
    performance = (DOCS / "performance.md").read_text(encoding="utf-8")
    names = ("10 intervals, K = 2, batch 1", "10 intervals, K = 2, batch 16", "PPO step of 8 images")
    for (what, published, here, ratio), name in zip(table("\n**Speed**"), names, strict=True):
        (ours,) = numbers(here)
        assert ours == pytest.approx(measured[name], abs=0.5), what
        assert all(f"{part:,.0f} ms" in performance for part in numbers(published)), what
        assert float(ratio) == pytest.approx(sum(numbers(published)) / ours, abs=0.05), what
    for batch, without, uncompiled in ((1, "1,507", "510 and"), (16, "16,400", "and 2,842 ms uncompiled")):
        assert without in performance and without in PAGE and uncompiled in prose()
        assert numbers(uncompiled)[0] == pytest.approx(measured[f"the same, --compile off, batch {batch}"], abs=0.5)


def test_size():
    folders = ("HPSv2", "MPS", "dnnlib", "torch_utils", "training")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in files]
    (stated,) = re.findall(r"some ([\d,]+) lines without tests and benchmarks", PAGE)
    assert sum(text.count("\n") for text in texts) == pytest.approx(numbers(stated)[0], rel=0.05)
    functions = [
        node
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [node.name for node in functions if node.end_lineno - node.lineno + 1 > 100]
    assert "one function has over 100 lines" in prose() and len(long) == 1, long


@needs_published
def test_source_in_a_published_table():
    data = (PUBLISHED / "sd15-best.pkl").read_bytes()
    texts = [value.encode() for _, value, _ in pickletools.genops(data) if isinstance(value, str)]
    source = max(texts, key=len)
    assert b"import torch" in source and b"class EPD_predictor" in source
    assert f"{len(source):,} of the {len(data):,} bytes of EPD's `sd15-best.pkl`" in PAGE
    assert f"all {len(list(PUBLISHED.glob('*.pkl')))} published ones open" in PAGE


# ----------------------------------------------------------------------------
# The published algorithm.


def test_the_published_algorithm_runs(tmp_path):
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:5] == ["python", "-m", "training.ppo.launch", "--config", "embedded"]
    overrides = words[6::2]
    assert set(words[5::2]) == {"--override"} and set(REFERENCE) <= set(overrides)
    config = load_config("embedded", overrides)
    assert config.ppo.baseline == "legacy_mixed" and not config.ppo.shared_noise and not config.ppo.train_scale_dir
    path = write_files(tmp_path)
    assert run_toy(path, "never", [*overrides, "ppo.steps=1", "evaluation.interval=0"]) == 0
    (metrics,) = (tmp_path / "exps").glob("*/logs/metrics.jsonl")
    assert json.loads(metrics.read_text())["images"] == 8


# ----------------------------------------------------------------------------
# Moving over.

# What a command needs at least; the page stands for any file.
BASE = {
    "sample.py": ["--predictor_path", str(DOCS / "differences.md"), "--prompt", "a cat"],
    "sample_baseline.py": ["--sampler", "ddim", "--prompt", "a cat"],
    "fake_train.py": ["--num-steps", "11", "--num-points", "2"],
    "training.ppo.launch": ["--config", "embedded"],
    "training.ppo.export_epd_predictor": ["exps/run"],
    "training.ppo.scripts.score_hps": ["--images", str(DOCS)],
}
SCORERS = ("hps", "clip", "aesthetic", "pick", "imagereward", "mps")


def command(name: str) -> click.Command:
    return importlib.import_module(name.removesuffix(".py")).main


def parse(name: str, words: str) -> dict:
    return command(name).make_context(name, [*BASE[name], *shlex.split(words)]).params


def options(name: str) -> dict[str, click.Parameter]:
    return {option: parameter for parameter in command(name).params for option in parameter.opts}


def test_options_that_stayed():
    rows = [(names, cell) for names, cell in table("What works as it did:")]
    assert len(rows) == 5
    stayed = []
    for names, cell in rows:
        groups = cell.split(";") if len(spans(names)) > 1 else [cell]
        for name, group in zip(spans(names), groups, strict=True):
            every = [name.replace("*", metric) for metric in SCORERS] if "*" in name else [name]
            stayed += [(one, option) for one in every for option in spans(group)]
    first = [option for name, option in stayed if name == "sample.py"]
    assert "these but the first" in rows[1][1]
    stayed += [("sample_baseline.py", option) for option in first[1:]]
    for name, option in stayed:
        assert option in options(name), (name, option)


def test_options_that_changed():
    """What is given as published is refused, what the page gives instead is taken."""
    rows = table("What is to be changed:")
    assert len(rows) > 10
    for cell, published, here, _ in rows:
        if cell == "configuration":
            for span in spans(published):
                ((section, values),) = yaml.safe_load(span).items()
                ((key, value),) = values.items()
                override = f"{section}.{key}={str(value).lower()}"
                result = CliRunner().invoke(
                    command("training.ppo.launch"), ["--config", "embedded", "--override", override, "--dry-run"]
                )
                assert result.exit_code == 2 and f"{section}.{key}" in result.stderr, override
            assert all(override.partition("=")[0] in flatten(Config()) for override in spans(here))
            continue
        (name,) = spans(cell)
        for span in spans(published):
            with pytest.raises(click.UsageError, match=r"No such option|unexpected extra argument"):
                parse(name, span)
        for span in spans(here):
            parse(name, span)
    assert "--use-fp16" not in options("sample_baseline.py") and "--precision" in options("sample_baseline.py")
    assert {"--s-churn", "--s-min", "--s-max", "--s-noise"} <= options("sample_baseline.py").keys()
    assert parse("training.ppo.launch", "--override ppo.steps=10")["overrides"] == ("ppo.steps=10",)


def test_defaults_that_changed():
    found = {}
    for names, cell, published, here in table("Defaults that are others:"):
        option = spans(cell)[0]
        for name in spans(names):
            found[name, option] = spans(here) or [here]
            assert published != here
            if option not in ("--max-order", "--inner-steps", "--r-epsilon"):
                assert found.pop((name, option)) == [str(options(name)[option].default)], (name, option)
    # These depend on the solver or on K: the page gives one case, --help the rule.
    assert found.pop(("fake_train.py", "--r-epsilon")) == [f"{SPREAD / 3:.2f}"]
    assert f"for K = 2 both {SPREAD / 2:.2f}" in PAGE
    for option in ("--max-order", "--inner-steps"):
        (stated,) = found.pop(("sample_baseline.py", option))
        assert f"[default: ({stated})]" in help_of("sample_baseline.py", option)
    assert not found


def help_of(name: str, option: str) -> str:
    text = " ".join(CliRunner().invoke(command(name), ["--help"]).stdout.split())
    return re.split(r" --(?!no-)", text.partition(f" {option} ")[2])[0]


# ----------------------------------------------------------------------------
# What is not here.


@needs_published
@pytest.mark.parametrize("name", ["sd3-512-best", "flux-best"])
def test_tables_of_other_models_start_training_and_are_not_sampled_with(name, tmp_path):
    file = PUBLISHED / f"{name}.pkl"
    arguments = ["--predictor_path", str(file), "--prompt", "a cat", "--seeds", "0", "--outdir", str(tmp_path / "out")]
    result = CliRunner().invoke(command("sample.py"), arguments)
    assert result.exit_code == 2 and "flowmatch is for flow models" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    config = load_config("embedded", [f"data.predictor_snapshot={file}", "model.num_steps=null"])
    assert start_table(config).num_points == 2


def test_published_checkpoints_and_score_files_are_refused(tmp_path):
    torch.save({"step_embed.weight": torch.zeros(10, 128)}, tmp_path / "policy-step000100.pt")
    with pytest.raises(CheckpointError, match="policy-step000100"):
        load_checkpoint(tmp_path / "policy-step000100.pt")
    record = {"images_dir": "a", "pattern": "*.png", "prompts_file": "b", "stats": {"mean": 0.25}, "metadata": {}}
    (tmp_path / "hps.json").write_text(json.dumps(record))
    result = CliRunner().invoke(command("training.ppo.scripts.compare"), [str(tmp_path / "hps.json")] * 2)
    assert result.exit_code == 2 and "is no score file" in result.stderr
