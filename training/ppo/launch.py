"""Train a solver table with PPO: `python -m training.ppo.launch`, or `torchrun ... -m` on several processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_utils.errors import user_errors
from torch_utils.options import EXIT_CODES, cache_dir_option, command
from training.ppo.config import (
    Config,
    ConfigError,
    check_files,
    check_names,
    check_packages,
    check_world_size,
    load_config,
    to_yaml,
)

if TYPE_CHECKING:
    from training.denoisers.base import Denoiser
    from training.ppo.inputs import Inputs
    from training.ppo.reward_base import Reward
    from training.ppo.reward_mix import RewardMix

# `RunDirectory` owns these names, but needs torch; a test keeps them in step.
CONFIG_IN_RUN = Path("configs/resolved_config.yaml")
START_IN_RUN = Path("configs/start_table.safetensors")


@dataclass(frozen=True)
class Models:
    """The frozen models of a run."""

    net: Denoiser
    mix: RewardMix  # what is trained on
    metrics: list[Reward]  # reported at evaluations, never trained on


def launch(config: Config, resume: str, device: str) -> int:
    """Check, load, train; returns the number of the signal that ended the run early, or 0.

    `device` is auto, cpu or cuda; `resume` as in `open_run`. A `UserError` comes before anything is written, but for
    what only the first step can show, such as a reward without the gradient that it needs.
    """
    from torch_utils import distributed
    from training.ppo.inputs import load_inputs

    with distributed.joined(device, config.run.timeout_minutes):
        distributed.on_main(lambda: check_world_size(config, distributed.world_size()))
        inputs = distributed.on_main(lambda: load_inputs(config))
        return train(config, inputs, load_models(config), resume)


def load_backbone(config: Config) -> Denoiser:
    """The model of `model.*` on this process's device, such that a run that goes on computes what it would have."""
    from torch_utils import distributed
    from training.denoisers import create_model

    model = config.model
    net = create_model(
        model.dataset_name,
        model.guidance_type,
        model.guidance_rate,
        device=distributed.device(),
        model_path=model.model_path,
        precision=model.precision,
        compile_mode=model.compile,
    )
    net.compile_calls(True)
    return net


def load_models(config: Config) -> Models:
    """Backbone, rewards and evaluation metrics on this process's device."""
    from torch_utils import distributed
    from training.ppo.reward_multi import create_mix, create_reward

    device, batch_size = distributed.device(), config.reward.batch_size
    net = load_backbone(config)
    mix = create_mix(config.reward, device)
    metrics = [create_reward(name, device=device, batch_size=batch_size) for name in config.evaluation.metrics]
    return Models(net, mix, metrics)


def train(config: Config, inputs: Inputs, models: Models, resume: str) -> int:
    """Build the parts, open the run folder, and run the loop; returns as `launch`."""
    from torch_utils import distributed
    from training.ppo.evaluation import MeanTableEvaluator
    from training.ppo.interrupt import StopRequest
    from training.ppo.policy import create_policy
    from training.ppo.ppo_trainer import PPOTrainer
    from training.ppo.rl_runner import EPDRolloutRunner
    from training.ppo.run_dir import open_run

    policy = create_policy(config, inputs.start)
    runner = EPDRolloutRunner(models.net, models.mix, inputs.prompts, inputs.start, config.ppo, config.run.seed)
    evaluator = None
    if config.evaluation.interval:
        judges = models.mix.for_evaluation(), models.metrics
        prompts, micro_batch = inputs.evaluation_prompts, config.ppo.rollout_micro_batch
        evaluator = MeanTableEvaluator(models.net, *judges, prompts, inputs.start, config.evaluation, micro_batch)
    with open_run(config, inputs.start, resume) as (directory, checkpoint), StopRequest() as stop:
        trainer = PPOTrainer(config, policy, runner, evaluator, directory)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        distributed.print0(describe(config))
        distributed.print0(f"run folder {directory.path}, {trainer.step} of {config.ppo.steps} steps done")
        signum = trainer.train(stop)
        if trainer.guard.best_step is not None:
            distributed.print0(trainer.guard.summary())
        distributed.print0(directory.path, file=sys.stdout)
        return signum


def config_of_run(run: Path, overrides: Sequence[str]) -> Config:
    """The configuration that the run folder keeps, with `overrides`, to continue it."""
    config = load_config(run / CONFIG_IN_RUN, overrides)
    if (run / START_IN_RUN).is_file():
        # The run's own copy: the file that it was copied from may be gone.
        config.data.predictor_snapshot = str(run / START_IN_RUN)
    return config


def describe(config: Config) -> str:
    """One line: what trains from where, with the learning rate that counts."""
    algorithm = config.trainer.algorithm
    rate = config.pathwise.learning_rate if algorithm == "pathwise" else config.ppo.learning_rate
    start = config.data.predictor_snapshot or "the cold-start table (a distilled one is better: training.distill)"
    return f"{algorithm}, {config.ppo.rollout_batch_size} images a step, learning rate {rate:g}, from {start}"


@command(
    {"Run": ("config_path", "overrides", "resume", "dry_run"), "Machine": ("device", "cache_dir")},
    exit_codes=f"{EXIT_CODES[:-1]} and 143 SIGTERM or SIGUSR1, after the step was finished and saved.",
)
@click.option(
    "--config",
    "config_path",
    help="YAML file, or a preset: embedded, sd15_single, sd15_parallel",
    metavar="FILE",
    type=Path,
)
@click.option(
    "--override", "overrides", help="Change one key, e.g. ppo.steps=100; repeatable", metavar="KEY=VALUE", multiple=True
)
@click.option("--resume", help="auto, never, or a run folder to continue", metavar="auto|never|RUN_DIR", default="auto")
@cache_dir_option
@click.option("--device", help="Where the models run", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("-n", "--dry-run", help="Check, print the resolved configuration, and stop", is_flag=True)
@user_errors
def main(config_path: Path | None, overrides: tuple[str, ...], resume: str, device: str, dry_run: bool) -> None:
    """Train a solver table with PPO and keep everything in <run.output_root>/<timestamp>-<run.run_name>/.

    \b
    auto   continues the newest run of the same name and configuration, else begins a new one
    never  begins a new run
    DIR    continues this run; --config may be left out

    Ctrl-C and SIGTERM finish the current step, save, and exit with 130 or 143. The run folder goes to stdout. Examples
    (installed: epd-train):

    \b
    python -m training.ppo.launch --config embedded --override ppo.steps=30
    torchrun --nproc_per_node=8 -m training.ppo.launch --config training/ppo/cfgs/sd15_parallel.yaml
    """
    if config_path is not None:
        config = load_config(config_path, overrides)
    elif resume in ("auto", "never"):
        raise ConfigError("--config FILE is missing; the presets are in training/ppo/cfgs/")
    else:
        config = config_of_run(Path(resume), overrides)
    check_names(config)
    check_packages(config)
    check_files(config)
    if dry_run:
        click.echo(to_yaml(config), nl=False)
        return
    signum = launch(config, resume, device)
    if signum:
        sys.exit(128 + signum)


if __name__ == "__main__":
    main()
