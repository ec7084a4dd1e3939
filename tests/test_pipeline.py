"""The whole pipeline by its commands, in small, on the embedded model: table, PPO, export, samples, scores, table."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fake_train
import sample
import sample_baseline
from solvers import SOLVERS
from torch_utils import distributed
from training import denoisers
from training.ppo import config, export_epd_predictor, launch, reward_multi
from training.ppo.scripts import compare, score_emoji
from training.table import load_table

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = str(ROOT / "src/prompts/emoji_test.txt")


def call(command, *arguments: object) -> str:
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    distributed.shutdown()
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A folder in which everything up to the scores has run."""
    root = tmp_path_factory.mktemp("pipeline")
    call(fake_train, "--dataset-name", "emoji", "--num-steps", 3, "--num-points", 2, "--outdir", root / "start")
    start = root / "start/network-snapshot-000000.pkl"
    overrides = {
        "run.output_root": root / "exps",
        "data.predictor_snapshot": start,
        "data.prompt_csv": ROOT / "src/prompts/emoji_train.txt",
        "model.num_steps": 3,
        "ppo.steps": 3,
        "ppo.rollout_batch_size": 4,
        "ppo.rloo_k": 2,
        "evaluation.interval": 3,
        "evaluation.prompt_file": ROOT / "src/prompts/emoji_eval.txt",
        "evaluation.num_prompts": 2,
        "evaluation.grid_images": 2,
    }
    options = [part for key, value in overrides.items() for part in ("--override", f"{key}={value}")]
    call(launch, "--config", ROOT / "training/ppo/cfgs/embedded.yaml", "--device", "cpu", *options)
    (run_dir,) = (root / "exps").iterdir()
    call(export_epd_predictor, run_dir, "--checkpoint", "checkpoints/policy-step000003.pt")
    learned = run_dir / "export/network-snapshot-export-step000003.pkl"
    common = ("--prompt-file", PROMPTS, "--seeds", "0-2", "--device", "cpu")
    call(sample, "--predictor_path", start, *common, "--outdir", root / "start-images")
    call(sample, "--predictor_path", learned, *common, "--outdir", root / "learned")
    call(
        sample_baseline,
        "--sampler",
        "ddim",
        "--dataset-name",
        "emoji",
        "--num-steps",
        5,
        *common,
        "--outdir",
        root / "ddim",
    )
    for folder in ("start-images", "learned", "ddim"):
        for metric in ("reward", "heldout"):
            output = root / f"{folder}-{metric}.json"
            call(score_emoji, "--metric", metric, "--images", root / folder, "--output-json", output, "--device", "cpu")
    return root


def test_run_folder_holds_what_was_promised(pipeline):
    (run_dir,) = (pipeline / "exps").iterdir()
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert {
        "configs/resolved_config.yaml",
        "logs/metrics.jsonl",
        "checkpoints/policy-step000003.pt",
        "checkpoints/policy-best.pt",
        "export/network-snapshot-export-step000003.pkl",
        "export/network-snapshot-export-step000003.safetensors",
        "export/training_options.json",
    } <= files
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run_dir / "logs/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(-1 <= line["reward_mean"] <= 1 for line in lines)
    assert "eval_reward_mean" in lines[2]
    assert "eval_emoji_heldout_mean" in lines[2]


def test_learned_table_differs_and_its_formats_agree(pipeline):
    (run_dir,) = (pipeline / "exps").iterdir()
    start = load_table(pipeline / "start/network-snapshot-000000.pkl")
    pkl = load_table(run_dir / "export/network-snapshot-export-step000003.pkl")
    safe = load_table(run_dir / "export/network-snapshot-export-step000003.safetensors")
    assert (pkl.positions - start.positions).abs().max() > 1e-3
    torch.testing.assert_close(pkl.positions, safe.positions, rtol=0, atol=1e-6)
    torch.testing.assert_close(pkl.weights, safe.weights, rtol=0, atol=1e-6)
    assert (safe.dataset_name, safe.guidance_rate, safe.schedule_type) == ("emoji", 7.5, "logsnr")


def test_comparison_table(pipeline):
    scores = [
        pipeline / f"{folder}-{metric}.json"
        for folder in ("learned", "start-images", "ddim")
        for metric in ("reward", "heldout")
    ]
    text = call(compare, *scores, "--reference", "learned", "--output-json", pipeline / "comparison.json")
    assert "learned" in text
    result = json.loads((pipeline / "comparison.json").read_text())
    assert [(row["label"], row["parallel_nfe"]) for row in result["rows"]] == [
        ("learned", 4),
        ("start-images", 4),
        ("ddim", 4),
    ]
    means = {}
    for folder in ("learned", "ddim"):
        record = json.loads((pipeline / f"{folder}-reward.json").read_text())
        means[folder] = sum(row["score"] for row in record["scores"]) / 3
    difference = result["rows"][2]["differences"]["emoji_reward"]["mean"]
    assert difference == pytest.approx(means["learned"] - means["ddim"], abs=1e-9)


def test_sampling_before_training_says_so(tmp_path):
    for file in ("sample.sh", "setup_env.sh"):
        shutil.copy(ROOT / file, tmp_path)
    result = subprocess.run(["bash", tmp_path / "sample.sh"], capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no learned table in exps/*-embedded/export; run: bash train.sh embedded" in result.stderr


def test_shell_scripts_name_an_unknown_preset():
    for script in ("train.sh", "sample.sh"):
        result = subprocess.run(["bash", ROOT / script, "flux"], capture_output=True, text=True, timeout=20)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "unknown preset 'flux'; use embedded, sd15 or sd15-multi" in result.stderr


@pytest.mark.parametrize("name", ["embedded", "sd15_single", "sd15_parallel"])
def test_shipped_configurations_are_valid(name):
    text = call(launch, "--config", ROOT / f"training/ppo/cfgs/{name}.yaml", "--dry-run")
    assert "rollout_batch_size" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.type=hpsv3", "reward.type=hpsv3 is unknown; use one of hps, clip,"),
        ("evaluation.metrics=[clap]", "evaluation.metrics=clap is unknown"),
        ("model.dataset_name=flux", "model.dataset_name=flux is unknown; use one of emoji, ms_coco"),
        ("reward.enable_amp=true", "only; emoji_reward is computed in float32"),
    ],
)
def test_unknown_names_are_refused_even_under_dry_run(override, message):
    config = str(ROOT / "training/ppo/cfgs/embedded.yaml")
    result = CliRunner().invoke(launch.main, ["--config", config, "--override", override, "--dry-run"])
    assert result.exit_code == 2
    assert message in result.output


def test_names_that_need_no_torch_agree_with_their_owners(pipeline):
    assert set(config.BACKBONE_NAMES) == set(denoisers.BACKBONES)
    assert set(config.GUIDANCE_TYPES) == set(denoisers.GUIDANCE_TYPES)
    assert set(config.REWARD_NAMES) == set(reward_multi.REWARD_TYPES)
    assert set(sample_baseline.SAMPLERS) <= set(SOLVERS)
    (run_dir,) = (pipeline / "exps").iterdir()
    assert (run_dir / launch.CONFIG_IN_RUN).is_file()
    assert (run_dir / launch.START_IN_RUN).is_file()
