"""The scorer core, its commands, and the comparison of score files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from PIL import Image
from run_folders import lines
from tiny_rewards import TINY_HPS, register_tiny_hps, write_emoji_folder, write_hps_checkpoint

from torch_utils.errors import UserError
from training.images import load_image
from training.ppo.comparison import compare, to_markdown
from training.ppo.intervals import student_t, summarize
from training.ppo.reward_hps import RewardHPS
from training.ppo.reward_models.emoji import RewardEmoji
from training.ppo.scoring import ScoringError, collect_images
from training.ppo.scripts import compare as compare_script
from training.ppo.scripts import score_emoji, score_hps

PROMPTS = ["a red apple", "a blue star", "a green cat", "a teal background", "a star on a cat", "a red star"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def emoji_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    write_emoji_folder(folder)
    return folder


def write_images(folder: Path, names: list[str], seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name)


def write_samples(folder: Path, seeds: list[int], **sampling: object) -> list[str]:
    """A folder as `sample.py` leaves it, listed out of order."""
    names = [f"000000/{seed:06d}.png" for seed in seeds]
    write_images(folder, names, seed=len(sampling))
    sampling = {"solver": "ddim", "options": {}, "parallel_nfe": 10, "table_sha256": None} | sampling
    rows = [
        {"file": name, "seed": seed, "prompt": PROMPTS[seed], **sampling}
        for name, seed in zip(names, seeds, strict=True)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return names


def write_prompts(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def score(*arguments: object, command=score_emoji):
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def refused(result, message: str) -> None:
    """One line on stderr that holds `message`, exit code 2."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert message in line


# Intervals


@pytest.mark.parametrize("degrees", [*range(1, 12), 30, 31, 99, 1000, 9999])
def test_student_t_equals_scipy(degrees):
    assert student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 10, 500])
def test_summary_equals_scipy(count):
    values = np.random.default_rng(count).normal(0.25, 0.01, count)
    summary = summarize(list(values))
    interval = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(summary["ci95"], interval, rtol=1e-9)
    np.testing.assert_allclose(
        [summary[key] for key in ("count", "mean", "std", "min", "max")],
        [count, values.mean(), values.std(ddof=1), values.min(), values.max()],
    )


def test_summary_of_one_image_has_no_interval():
    assert summarize([0.5]) == {"count": 1, "mean": 0.5, "std": None, "min": 0.5, "max": 0.5, "ci95": None}


# Joining images and prompts


def test_the_manifest_joins(tmp_path, capsys):
    write_samples(tmp_path, [4, 0, 2], table_sha256="ab")
    write_images(tmp_path, ["grid.png", "other.png"])
    images = collect_images(tmp_path)
    assert capsys.readouterr().err == f"not in {tmp_path / 'manifest.jsonl'}, so not scored: other.png\n"
    assert [(e.file, e.seed, e.prompt) for e in images.entries] == [
        (f"000000/{seed:06d}.png", seed, PROMPTS[seed]) for seed in (0, 2, 4)
    ]
    assert (images.sampling["solver"], images.sampling["options"]) == ("ddim", {})
    assert images.sampling["parallel_nfe"] == 10
    assert images.sampling["table_sha256"] == "ab"
    # Prompts beside a manifest are a check: line s belongs to seed s, whichever seeds there are.
    assert collect_images(tmp_path, "**/*.png", write_prompts(tmp_path / "p.txt", PROMPTS)) == images
    assert [e.seed for e in collect_images(tmp_path, "**/00000[24].png").entries] == [2, 4]


def test_foreign_folders_pair_by_position_in_natural_order(tmp_path):
    names = ["b/1.png", "a10.png", "a2.png", "a9.png"]
    write_images(tmp_path, [*names, "notes.jpg"])
    images = collect_images(tmp_path, "**/*.png", write_prompts(tmp_path / "p.txt", PROMPTS[:4]))
    assert [e.file for e in images.entries] == ["a2.png", "a9.png", "a10.png", "b/1.png"]
    assert [(e.seed, e.prompt) for e in images.entries] == list(enumerate(PROMPTS[:4]))
    assert images.sampling == {}


def rewrite(folder: Path, change) -> None:
    rows = lines(folder / "manifest.jsonl")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def test_prompts_may_hold_any_character(tmp_path):
    write_samples(tmp_path, [0])
    row = json.loads((tmp_path / "manifest.jsonl").read_text()) | {"prompt": "a\u2028b\x85 \u00e9 \U0001f34e"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert collect_images(tmp_path).entries[0].prompt == row["prompt"]
    (tmp_path / "manifest.jsonl").write_bytes(b'{"file": "x\xff"}\n')
    with pytest.raises(ScoringError, match="line 1 lacks"):
        collect_images(tmp_path)


def test_unfitting_folders_are_refused(tmp_path):
    samples, foreign = tmp_path / "samples", tmp_path / "foreign"
    write_samples(samples, [0, 1, 2])
    write_images(foreign, ["0.png", "1.png"])
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:3])
    cases = [
        (tmp_path / "none", "*.png", None, "is no folder"),
        (samples, "*.jpg", None, r"no image in .* matches --pattern '\*\.jpg'"),
        (samples, "/*.png", None, "cannot be used"),
        (samples, "", None, "cannot be used"),
        (foreign, "*.png", None, r"has no manifest\.jsonl: say with --prompts"),
        (foreign, "*.png", prompts, r"2 images in .* but .*p\.txt has 3 prompts"),
        (samples, "**/*.png", write_prompts(tmp_path / "few.txt", PROMPTS[:2]), "2"),
        (samples, "**/*.png", write_prompts(tmp_path / "other.txt", [*PROMPTS[:2], "b"]), "seed 2 was sampled with"),
    ]
    for folder, pattern, prompts_file, message in cases:
        with pytest.raises(UserError, match=message):
            collect_images(folder, pattern, prompts_file)
    changes = [
        (lambda rows: [*rows, rows[0]], "lists file 000000/000002.png more than once"),
        (lambda rows: [*rows, {**rows[0], "file": "x.png"}], "lists seed 2 more than once"),
        (lambda rows: [*rows, {**rows[0], "file": "x.png", "seed": 7}], "1 of the 4 images in .* missing: seeds 7"),
        (lambda rows: [{**rows[0], "solver": "heun"}, *rows[1:]], "mixes images of solver"),
        (lambda rows: [{**rows[0], "options": {"a": 1}}, *rows[1:]], "mixes images of options {}, {'a': 1}: score"),
        (
            lambda rows: [{**rows[0], "schedule_type": "logsnr"}, *rows[1:]],
            "mixes images of schedule_type None, logsnr",
        ),
        (lambda rows: [{**rows[0], "seed": "2"}, *rows[1:]], "line 1 lacks file, seed or prompt"),
        (lambda rows: [{**rows[0], "prompt": "half \ud83e"}, *rows[1:]], "line 1 lacks file, seed or prompt"),
        (lambda rows: [[1, 2], *rows], "line 1 lacks file, seed or prompt"),
        (lambda rows: [], "none of the 3 images"),
    ]
    original = (samples / "manifest.jsonl").read_text()
    for change, message in changes:
        rewrite(samples, change)
        with pytest.raises(ScoringError, match=message):
            collect_images(samples)
        (samples / "manifest.jsonl").write_text(original)


# The commands


def test_score_emoji_end_to_end(tmp_path, emoji_folder):
    """Scores in the JSON are those of the reward itself, for pictures of every kind and size."""
    names = write_samples(tmp_path / "samples", [0, 1, 2, 3, 4, 5])
    folder = tmp_path / "samples"
    Image.open(folder / names[0]).convert("RGBA").save(folder / names[0])
    Image.open(folder / names[1]).convert("L").save(folder / names[1])
    Image.open(folder / names[2]).resize((30, 50)).save(folder / names[2])
    Image.open(folder / names[3]).resize((1, 1)).save(folder / names[3])
    output = tmp_path / "results" / "deep" / "emoji.json"
    arguments = ["--images", folder, "--weights", emoji_folder, "--batch-size", 4, "--device", "cpu"]
    result = score(*arguments, "--metric", "heldout", "--output-json", output)
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    reward = RewardEmoji("emoji_heldout", emoji_folder)
    expected = [reward.score(load_image(folder / n)[None], [p]).item() for n, p in zip(names, PROMPTS, strict=True)]
    assert [row["score"] for row in record["scores"]] == pytest.approx(expected, abs=2e-6)
    assert [(row["file"], row["seed"], row["prompt"]) for row in record["scores"]] == list(
        zip(names, range(6), PROMPTS, strict=True)
    )
    assert record["mean"] == pytest.approx(np.mean(expected), abs=2e-6)
    assert (record["metric"], record["solver"], record["parallel_nfe"]) == ("emoji_heldout", "ddim", 10)
    assert record["weights_sha256"] == reward.weights_sha256
    assert torch.__version__.startswith(record["libraries"]["torch"])
    assert (record["unreadable"], record["truncated_prompts"]) == ([], 0)
    assert f"mean   {record['mean']:.6f}" in result.stdout
    assert "img/s" not in result.stdout
    # The same metric of the same folder may be scored again; nothing else is overwritten.
    before = output.read_bytes()
    assert score(*arguments, "--metric", "heldout", "--output-json", output).exit_code == 0
    assert output.read_bytes() == before
    refused(score(*arguments, "--output-json", output), "exists and holds no emoji_reward scores")
    refused(score(*arguments, "--output-json", folder / names[0]), "exists and holds no emoji_reward scores")
    assert output.read_bytes() == before


def test_score_hps_has_the_embedded_judge_at_hand(tmp_path):
    """The real weights, out of the box: the scores of score_emoji, and others than those of its held-out judge."""
    write_samples(tmp_path / "samples", [2, 0, 1])
    records = []
    for name, options, command in (
        ("hps", ["--version", "embedded"], score_hps),
        ("reward", [], score_emoji),
        ("heldout", ["--metric", "heldout"], score_emoji),
    ):
        output = tmp_path / f"{name}.json"
        result = score("--images", tmp_path / "samples", "--output-json", output, *options, command=command)
        assert result.exit_code == 0, result.stderr
        records.append(json.loads(output.read_text()))
    hps, reward, heldout = records
    assert hps["scores"] == reward["scores"] and hps["metric"] == reward["metric"] == "emoji_reward"
    assert heldout["scores"] != reward["scores"] and heldout["weights_sha256"] != reward["weights_sha256"]


def test_score_hps_end_to_end(tmp_path):
    register_tiny_hps(tmp_path)
    write_hps_checkpoint(tmp_path / "tiny.pt")
    write_images(tmp_path / "images", ["1.png", "2.png", "10.png"])
    prompts = write_prompts(tmp_path / "p.txt", ["a " * 100, *PROMPTS[1:3]])
    result = score(
        *("--images", tmp_path / "images", "--prompts", prompts, "--pattern", "**/*.png", "--architecture", TINY_HPS),
        *("--weights", tmp_path / "tiny.pt", "--output-json", tmp_path / "hps.json", "--device", "cpu"),
        command=score_hps,
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "hps.json").read_text())
    reward = RewardHPS(tmp_path / "tiny.pt", architecture=TINY_HPS)
    images = torch.stack([load_image(tmp_path / "images" / name) for name in ("1.png", "2.png", "10.png")])
    expected = reward.score(images, ["a " * 100, *PROMPTS[1:3]])
    assert [row["score"] for row in record["scores"]] == pytest.approx(expected.tolist(), abs=2e-6)
    assert record["metric"] == "hps_v2.1"
    assert record["truncated_prompts"] == 1


def test_an_unreadable_image_is_named_and_the_rest_is_kept(tmp_path, emoji_folder):
    names = write_samples(tmp_path / "samples", [0, 1, 2, 3])
    broken = tmp_path / "samples" / names[1]
    broken.write_bytes(broken.read_bytes()[:2000])
    output = tmp_path / "scores.json"
    arguments = ["--images", tmp_path / "samples", "--weights", emoji_folder, "--device", "cpu"]
    refused(score(*arguments, "--output-json", output), f"1 of 4 images cannot be read: {names[1]}")
    record = json.loads(output.read_text())
    assert [row["seed"] for row in record["scores"]] == [0, 2, 3]
    assert (record["count"], record["unreadable"]) == (3, [names[1]])
    refused(score(output, command=compare_script), "lacks 1 unreadable images")
    for name in names:
        (tmp_path / "samples" / name).write_bytes(b"no image")
    refused(score(*arguments, "--output-json", tmp_path / "none.json"), "none of the 4 images")
    assert not (tmp_path / "none.json").exists()


def test_mistakes_are_one_line_before_the_model_loads(tmp_path, emoji_folder):
    """The weights are broken, so that a message about anything else proves that they were not yet loaded."""
    weights = tmp_path / "weights"
    write_emoji_folder(weights)
    (weights / "model.safetensors").write_bytes(b"broken")
    samples = tmp_path / "samples"
    write_samples(samples, [0, 1])
    (tmp_path / "file").write_text("")
    arguments = ["--images", samples, "--weights", weights, "--device", "cpu"]
    refused(score(*arguments), "model.safetensors is damaged")
    refused(score(*arguments, "--pattern", "*.webp"), "matches --pattern")
    refused(score(*arguments, "--output-json", tmp_path / "file" / "x.json"), "cannot be made")
    refused(score(*arguments, "--output-json", tmp_path / "file"), "exists and holds no emoji_reward scores")
    refused(score("--images", samples, "--weights", tmp_path / "none"), "config.json is missing")
    refused(score("--images", samples, "--weights", weights, "--device", "tpu9"), "tpu9")
    refused(score("--images", samples, "--weights", tmp_path / "no.pt", command=score_hps), "no.pt is missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "samples", "weights"]


@pytest.mark.parametrize(
    "script", sorted(path.stem for path in Path(compare_script.__file__).parent.glob("*.py") if path.stem != "__init__")
)
def test_help_loads_no_heavy_library(script):
    code = (
        "import sys; from click.testing import CliRunner\n"
        f"from training.ppo.scripts import {script} as script\n"
        "result = CliRunner().invoke(script.main, ['--help'])\n"
        "assert result.exit_code == 0 and '--output-json' in result.output\n"
        "print(sorted({'torch', 'transformers', 'open_clip', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Comparing


def record(folder: str, scores: list[float], metric: str = "hps_v2.1", **changes: object) -> dict:
    rows = [{"file": f"{i}.png", "seed": i, "prompt": PROMPTS[i], "score": s} for i, s in enumerate(scores)]
    fields = {"metric": metric, "images_dir": folder, "solver": Path(folder).name}
    fields |= {"nfe": 15, "parallel_nfe": 10, "forwards": 30, "options": {"max_order": 2}, "schedule_type": "logsnr"}
    how = {"weights_sha256": "ab", "preprocessing": "p", "dtype": "float32", "libraries": {"torch": "2.15"}}
    return {**fields, "version": "v2.1", **how, "unreadable": [], "scores": rows, **changes}


def test_comparison_arithmetic():
    """By hand: learned - ddim is (0.1, 0.2, 0.3), mean 0.2, std 0.1, t(0.975, 2) = 4.302653, half 0.2484138."""
    learned, ddim = record("s/learned", [0.5, 0.7, 0.9]), record("s/ddim", [0.4, 0.5, 0.6])
    ddim["scores"].reverse()
    others = [record("s/learned", [1.0, 1.0, 3.0], "judge"), record("s/ddim", [1.0, 2.0, 2.0], "judge")]
    comparison = compare([learned, *others, ddim], reference="learned")
    assert comparison["count"] == 3
    first, second = comparison["rows"]
    assert (first["label"], first["differences"], second["label"]) == ("learned", None, "ddim")
    assert (second["solver"], second["options"], second["schedule_type"]) == ("ddim", {"max_order": 2}, "logsnr")
    assert (second["nfe"], second["parallel_nfe"], second["forwards"]) == (15, 10, 30)
    assert first["scores"]["hps_v2.1"]["mean"] == pytest.approx(0.7)
    assert first["scores"]["hps_v2.1"]["ci95"] == pytest.approx([0.7 - 0.4968276, 0.7 + 0.4968276], abs=1e-6)
    difference = second["differences"]["hps_v2.1"]
    assert difference["mean"] == pytest.approx(0.2)
    assert difference["ci95"] == pytest.approx([0.2 - 0.2484138, 0.2 + 0.2484138], abs=1e-6)
    assert difference["wins"] == 1
    judge = second["differences"]["judge"]
    assert (judge["mean"], judge["min"], judge["max"], judge["wins"]) == (0, -1, 1, 0.5)
    lines = to_markdown(comparison).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == [
        *("label", "solver", "parallel NFE", "NFE", "forwards", "hps_v2.1", "judge"),
        *("learned - this, hps_v2.1", "learned - this, judge"),
    ]
    assert cells[2] == ["learned", "learned", "10", "15", "30", "0.7000 ± 0.4968", "1.6667 ± 2.8684", "", ""]
    assert cells[3][5:] == ["0.5000 ± 0.2484", "1.6667 ± 1.4342", "+0.2000 ± 0.2484", "+0.0000 ± 2.4841"]
    assert len({len(line) for line in lines[:4]}) == 1


def test_comparison_without_reference_or_sampling_facts():
    foreign = record("photos", [0.25])
    for name in ("solver", "options", "schedule_type", "nfe", "parallel_nfe", "forwards"):
        del foreign[name]
    comparison = compare([foreign])
    assert to_markdown(comparison).splitlines()[2].replace(" ", "") == "|photos|||||0.2500|"
    assert (comparison["rows"][0]["options"], comparison["rows"][0]["forwards"]) == (None, None)


def test_folders_of_one_name_are_told_apart():
    comparison = compare([record("a/run", [0.1, 0.2]), record("b/run", [0.1, 0.2])])
    assert [row["label"] for row in comparison["rows"]] == ["a/run", "b/run"]


def test_unequal_sets_are_refused():
    full, short = record("full", [0.1, 0.2, 0.3, 0.4]), record("short", [0.1, 0.2, 0.3, 0.4])
    del short["scores"][1], short["scores"][2]
    other_prompt, late = record("other", [0.1, 0.2]), record("late", [0.1, 0.2, 0.3, 0.4, 0.5])
    other_prompt["scores"][1]["prompt"] = "another"
    cases = [
        ([full, short], None, "different images: short lacks seeds 1, 3$"),
        ([full, late, short], None, "full lacks seeds 4; short lacks seeds 1, 3, 4"),
        ([record("one", [0.1, 0.2]), other_prompt], None, "seed 1 has the prompt 'a blue star' in one, but 'another'"),
        ([full, record("full", [0.1], "judge")], None, r"full \(judge\) lacks seeds 1, 2, 3"),
        ([full, record("x", [0.1] * 4, "judge")], None, "full has no judge scores"),
        ([full, full], None, "hps_v2.1 of full is given twice"),
        ([full], "best", "--reference 'best' is none of the labels full"),
    ]
    for records, reference, message in cases:
        with pytest.raises(UserError, match=message):
            compare(records, reference)


@pytest.mark.parametrize("field", ["version", "weights_sha256", "preprocessing", "dtype", "libraries"])
def test_unlike_measurements_are_not_compared(field, capsys):
    records = [record("one", [0.1, 0.2]), record("two", [0.1, 0.2], **{field: "other"})]
    with pytest.raises(UserError, match=f"hps_v2.1 was measured differently: {field} is"):
        compare(records)
    assert len(compare(records, force=True)["rows"]) == 2
    assert f"{field} is" in capsys.readouterr().err


def test_compare_end_to_end(tmp_path, emoji_folder):
    files = []
    for solver, nfe in (("epd", 10), ("ddim", 50)):
        write_samples(tmp_path / solver, [0, 1, 2, 3], solver=solver, parallel_nfe=nfe, **{solver: 1})
        for metric in ("reward", "heldout"):
            files.append(tmp_path / f"{solver}-{metric}.json")
            arguments = ["--images", tmp_path / solver, "--weights", emoji_folder, "--metric", metric]
            assert score(*arguments, "--output-json", files[-1], "--device", "cpu").exit_code == 0
    outputs = ["--output-json", tmp_path / "table.json", "--output-md", tmp_path / "table.md"]
    for _ in range(2):  # an earlier table is replaced
        result = score(*files, "--reference", "epd", *outputs, command=compare_script)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "table.md").read_text() == result.stdout
    assert "| ddim" in result.stdout and "| epd " in result.stdout
    comparison = json.loads((tmp_path / "table.json").read_text())
    scores = {path.stem: [row["score"] for row in json.loads(path.read_text())["scores"]] for path in files}
    gaps = np.subtract(scores["epd-reward"], scores["ddim-reward"])
    assert comparison["rows"][1]["differences"]["emoji_reward"]["mean"] == pytest.approx(gaps.mean())
    assert comparison["rows"][1]["parallel_nfe"] == 50
    refused(score(*files, "--output-json", files[0], command=compare_script), "exists and is no comparison")
    (tmp_path / "notes.md").write_text("# Notes\n")
    refused(score(*files, "--output-md", tmp_path / "notes.md", command=compare_script), "exists and is no comparison")
    refused(score(tmp_path / "no.json", command=compare_script), "no.json does not exist")
    refused(score(tmp_path / "table.json", command=compare_script), "is no score file")
    refused(score(tmp_path / "notes.md", command=compare_script), "is no score file")
