"""The files that a configuration names, read and checked before any model loads and before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch_utils.distributed import print0
from torch_utils.download_util import check_file_by_key
from training.denoisers import check_model, check_model_schedule, find_model, note_resolution
from training.ppo.cold_start import cold_start_table
from training.ppo.config import Config, ConfigError, ModelConfig, cold_start_shape, trained_rewards
from training.ppo.reward_multi import check_reward_weights
from training.prompts import load_prompts
from training.table import SolverTable, load_table


@dataclass(frozen=True)
class Inputs:
    """What a run needs beside its models."""

    start: SolverTable  # with the conditions of `model.*`
    prompts: list[str]  # for training
    evaluation_prompts: list[str]  # none of them among `prompts`; empty where evaluation is off


def load_inputs(config: Config) -> Inputs:
    """Read the start table and the prompts, find the weights. Raises `UserError` subclasses, one line each."""
    model = config.model
    named = model.dataset_name, model.guidance_type, model.guidance_rate, model.model_path, model.precision
    check_model(*named)
    check_model_schedule(model.dataset_name, model.schedule_type)
    start = start_table(config)
    prompts, evaluation_prompts = split_prompts(config)
    for reward in trained_rewards(config.reward):
        check_reward_weights(reward.type, reward.weights_path)
    for metric in config.evaluation.metrics:
        check_reward_weights(metric)
    found = find_model(*named)  # last, because it may download gigabytes
    if note := note_resolution(model.dataset_name, found, start.img_resolution):
        print0(note)
    return Inputs(start, prompts, evaluation_prompts)


def start_table(config: Config) -> SolverTable:
    """The table of `data.predictor_snapshot`, or the cold-start table, under the conditions of `model.*`.

    The configuration decides how the table is used; where the table was made for other conditions, a note says so.
    """
    model, snapshot = config.model, config.data.predictor_snapshot
    if snapshot is None:
        return replace(cold_start_table(*cold_start_shape(model)), **_conditions(model))
    table = load_table(snapshot)
    for name in ("num_steps", "num_points"):
        wanted, found = getattr(model, name), getattr(table, name)
        if wanted not in (None, found):
            raise ConfigError(
                f"model.{name}={wanted}, but {snapshot} has {found}; leave model.{name} out, or build a table"
            )
    if table.sampler_stu != "epd":
        raise ConfigError(f"{snapshot} is a table for the solver {table.sampler_stu!r}; PPO trains tables for 'epd'")
    for name, wanted in _conditions(model).items():
        found = getattr(table, name)
        if found != wanted:
            print0(f"note: {snapshot} was made for {name}={found}; this run uses model.{name}={wanted}")
    return replace(table, **_conditions(model))


def _conditions(model: ModelConfig) -> dict:
    conditions = {
        "dataset_name": model.dataset_name,
        "guidance_type": model.guidance_type,
        "guidance_rate": model.guidance_rate,
        "schedule_type": model.schedule_type,
        "schedule_rho": model.schedule_rho,
        "sigma_min": model.sigma_min,
        "sigma_max": model.sigma_max,
        "afs": model.afs,
    }
    # A range left open is the table's own, or the model's.
    return {name: value for name, value in conditions.items() if value is not None}


def split_prompts(config: Config) -> tuple[list[str], list[str]]:
    """Training and evaluation prompts. A prompt that is evaluated is never trained on, wherever it comes from."""
    evaluation = config.evaluation
    path = check_file_by_key("prompts") if config.data.prompt_csv is None else Path(config.data.prompt_csv)
    prompts = load_prompts(path)
    if evaluation.interval == 0:
        return prompts, []
    if evaluation.prompt_file is None:
        held_out = prompts[-evaluation.num_prompts :]
    else:
        held_out = load_prompts(evaluation.prompt_file)[: evaluation.num_prompts]
        if len(held_out) < evaluation.num_prompts:
            raise ConfigError(
                f"evaluation.num_prompts={evaluation.num_prompts}, but {evaluation.prompt_file} has {len(held_out)}"
            )
    excluded = set(held_out)
    training = [prompt for prompt in prompts if prompt not in excluded]
    if not training:
        raise ConfigError(
            f"{path} has no prompt left to train on beside the {len(held_out)} held out for evaluation; "
            "lower evaluation.num_prompts, or name other prompts in evaluation.prompt_file"
        )
    return training, held_out
