"""The whole loop on the toy: it learns, its logs hold, and neither ranks nor interruptions change its numbers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launchers import python_path, torchrun
from run_folders import assert_same_logs, lines, only_run
from toy_training import Models, ToyDenoiser, ToyReward, run_toy, toy_inputs, toy_models, write_files

from torch_utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from torch_utils.errors import UserError
from training.ppo.config import Config, PPOConfig, load_config
from training.ppo.interrupt import StopRequest
from training.ppo.policy import EPDParamPolicy
from training.ppo.ppo_trainer import PPOTrainer
from training.ppo.rdpo import RDPO
from training.ppo.reporting import Progress, append_line, drop_lines_after
from training.ppo.reward_mix import RewardMix
from training.ppo.rl_runner import Draw, EPDRolloutRunner, Rollout
from training.ppo.run_dir import RunError, open_run
from training.table import SolverTable, load_table

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def toy(tmp_path):
    return write_files(tmp_path)


def final_state(directory):
    return load_checkpoint(directory.latest_checkpoint())


def assert_same_policy(first, second):
    assert first["step"] == second["step"]
    guards = first["guard"], second["guard"]
    assert guards[0]["best_step"] == guards[1]["best_step"] and guards[0]["consecutive"] == guards[1]["consecutive"]
    for name, scores in guards[0]["best_scores"].items():
        assert torch.equal(scores, guards[1]["best_scores"][name])
    assert first["policy"].keys() == second["policy"].keys()
    for key, value in first["policy"].items():
        assert torch.equal(value, second["policy"][key])


def run_program(toy, *arguments, ranks=1, **options):
    """The toy as a program of its own: plain, or `ranks` processes under torchrun."""
    command = [sys.executable, *torchrun(ranks), REPOSITORY / "tests" / "toy_training.py", toy, *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


# --- Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["direct", "mlp"])
def test_training_improves_the_mean_table(toy, tmp_path, parameterization):
    rate = {"direct": "0.05", "mlp": "0.003"}[parameterization]
    options = ["ppo.steps=30", "evaluation.interval=10", f"ppo.learning_rate={rate}"]
    assert run_toy(toy, "never", [*options, f"policy.parameterization={parameterization}"]) == 0
    evaluations = lines(only_run(tmp_path).evaluations)
    assert [record["step"] for record in evaluations] == [0, 10, 20, 30]
    # Exact samples would score -0.0798, the mean distance of N(0, 0.1^2) from its centre.
    first, last = evaluations[0]["reward_mean"], evaluations[-1]["reward_mean"]
    assert last > first + 0.5 * (-0.0798 - first)
    # The metric that was not trained on agrees.
    assert evaluations[-1]["toy_spread_mean"] > evaluations[0]["toy_spread_mean"]


class HackedReward(ToyReward):
    """Wants pictures ever farther from the prompt's colour: the opposite of the held-out metric."""

    def score(self, images, prompts):
        return -super().score(images, prompts)


@pytest.mark.parametrize(("on_divergence", "steps"), [("flag", 8), ("stop", 4)])
def test_a_reward_that_is_exploited_is_flagged_or_ends_the_run(toy, tmp_path, on_divergence, steps, capsys):
    models = Models(ToyDenoiser(), RewardMix.of(HackedReward()), [ToyReward("toy_spread", power=2)])
    options = ["ppo.steps=8", "ppo.learning_rate=0.3", f"evaluation.on_divergence={on_divergence}"]
    assert run_toy(toy, "never", options, models) == 0
    directory = only_run(tmp_path)
    evaluations = lines(directory.evaluations)
    assert [record["step"] for record in evaluations] == list(range(0, steps + 1, 2))
    assert [record["diverging"] for record in evaluations] == [False] + [True] * (steps // 2)
    assert "step 2: toy_reward rose by" in capsys.readouterr().err
    assert load_checkpoint(directory.best_checkpoint)["step"] == 0
    assert final_state(directory)["step"] == steps
    run_toy(toy, str(directory.path), options, models)  # what was stopped stays stopped
    assert final_state(directory)["step"] == steps


def test_pathwise_learns_the_toy_and_resumes(toy, tmp_path):
    options = ["trainer.algorithm=pathwise", "pathwise.learning_rate=0.1", "ppo.steps=6"]
    run_toy(toy, "never", [*options, f"run.output_root={tmp_path}/undisturbed"])
    undisturbed = only_run(tmp_path, "undisturbed")
    rewards = [record["reward_mean"] for record in lines(undisturbed.evaluations)]
    assert rewards[-1] > rewards[0] + 0.5 * (-0.0798 - rewards[0])

    interrupted = RewardMix.of(SignalAfter(3, signal.SIGTERM))
    run_toy(toy, "never", options, Models(ToyDenoiser(), interrupted, toy_models().metrics))
    run_toy(toy, "auto", options)
    directory = only_run(tmp_path)
    assert_same_policy(final_state(undisturbed), final_state(directory))
    assert_same_logs(undisturbed, directory)


def test_too_many_images_for_the_gpu_are_said_and_fewer_go_on(toy, tmp_path):
    """The memory gives out in the fourth rollout; the same run ends as an undisturbed one with smaller batches."""

    class Hungry(ToyReward):
        def __init__(self):
            super().__init__()
            self.left = 4

        def score(self, images, prompts):
            self.left -= len(prompts) == 16
            if not self.left:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return super().score(images, prompts)

    with pytest.raises(UserError, match=r"^step 4: .* fewer images at once with ppo.rollout_micro_batch \(now null, "):
        run_toy(toy, "never", [], Models(ToyDenoiser(), RewardMix.of(Hungry()), toy_models().metrics))
    run_toy(toy, "auto", ["ppo.rollout_micro_batch=4"])
    directory = only_run(tmp_path)
    run_toy(toy, "never", [f"run.output_root={tmp_path}/undisturbed"])
    assert_same_policy(final_state(only_run(tmp_path, "undisturbed")), final_state(directory))


@pytest.mark.parametrize(("algorithm", "rate"), [("rdpo", "0.2"), ("pathwise", "0.4")])
def test_the_run_says_which_learning_rate_counts(toy, algorithm, rate, capsys):
    rates = ["ppo.learning_rate=0.2", "pathwise.learning_rate=0.4"]
    run_toy(toy, "never", ["ppo.steps=1", f"trainer.algorithm={algorithm}", *rates])
    said = capsys.readouterr().err
    assert f"{algorithm}, 16 images a step, learning rate {rate}, from the cold-start table (a distilled" in said


def test_the_best_policy_is_kept(toy, tmp_path):
    wild = ["ppo.learning_rate=2.0", "ppo.learning_rate_schedule=constant", "ppo.concentration_end=null"]
    run_toy(toy, "never", ["ppo.steps=6", "evaluation.interval=1", *wild])
    directory = only_run(tmp_path)
    evaluations = lines(directory.evaluations)
    best = max(evaluations, key=lambda record: record["toy_spread_mean"])
    assert best["step"] < 6  # the rate is far too high: later steps are worse
    state = load_checkpoint(directory.best_checkpoint)
    assert state["step"] == best["step"] == state["guard"]["best_step"]
    assert state["guard"]["best_scores"]["toy_spread"].mean().item() == best["toy_spread_mean"]


def one_update(rewards, **ppo):
    """Policy before and after a single update on 4 samples in 2 groups, and the statistics."""
    table = SolverTable(positions=[[0.3, 0.6]] * 2, weights=[[0.5, 0.5]] * 2)
    policy = EPDParamPolicy(table, parameterization="direct")
    sample = policy.sample_table(4, seed=0)
    draw = Draw(sample, ["a", "a", "b", "b"], [0, 0, 1, 1], torch.tensor([0, 0, 1, 1]))
    options = PPOConfig(rollout_batch_size=4, rloo_k=2, **{"ppo_epochs": 1, "learning_rate": 0.01, **ppo})
    statistics = RDPO(policy, options, seed=0).update(1, Rollout(draw, torch.tensor(rewards, dtype=torch.float64)))
    return sample, policy, statistics


def test_an_update_makes_better_tables_likelier():
    sample, policy, statistics = one_update([1.0, 0.0, 5.0, 6.0])
    gained = (policy.log_prob(sample) - sample.log_prob).detach()
    assert gained[0] > gained[1] and gained[3] > gained[2]
    assert statistics["kl"] > 0 and statistics["approx_kl"] > 0 and statistics["grad_norm"] > 0
    ratios = gained.exp()
    assert statistics["ratio_mean"] == pytest.approx(ratios.mean().item())
    assert statistics["ratio_max"] == pytest.approx(ratios.max().item())


def test_baselines_differ_where_prompts_differ():
    # Prompt a scores low and b high. Per prompt the first table of each pair wins; the published grouping compares
    # sample 0 with 2 and 1 with 3, and so rewards both tables of the easy prompt.
    rewards = [0.1, 0.0, 10.1, 10.0]
    sample, prompt, _ = one_update(rewards)
    _, mixed, _ = one_update(rewards, baseline="legacy_mixed")
    by_prompt = (prompt.log_prob(sample) - sample.log_prob).detach()
    by_column = (mixed.log_prob(sample) - sample.log_prob).detach()
    assert by_prompt[0] > by_prompt[1] and by_prompt[2] > by_prompt[3]
    assert by_column[2] + by_column[3] > by_column[0] + by_column[1]


def test_entropy_and_kl_terms():
    equal = [1.0, 1.0, 1.0, 1.0]  # no advantage: only the extra terms act
    _, still, _ = one_update(equal)
    _, wider, _ = one_update(equal, entropy_coef=1.0)
    assert wider.entropy() > still.entropy()
    rewards = [1.0, 0.0, 5.0, 6.0]
    _, free, _ = one_update(rewards, ppo_epochs=20, clip_range=10.0)
    _, held, _ = one_update(rewards, ppo_epochs=20, clip_range=10.0, kl_coef=10.0)
    assert held.kl() < 0.5 * free.kl()


def test_gradient_limit():
    rewards = [1.0, 0.0, 5.0, 6.0]
    _, _, free = one_update(rewards, max_grad_norm=None)
    _, _, held = one_update(rewards, max_grad_norm=1e-3)
    assert free["grad_norm"] == held["grad_norm"] > 1e-3  # what is reported is the norm before the limit


def test_exploration_narrows_geometrically():
    policy = EPDParamPolicy(SolverTable(positions=[[0.3, 0.6]], weights=[[0.5, 0.5]]), parameterization="direct")
    learner = RDPO(policy, PPOConfig(steps=3, dirichlet_concentration=10.0, concentration_end=1000.0), seed=0)
    assert [learner.concentration(step) for step in (1, 2, 3)] == pytest.approx([10, 100, 1000])
    constant = RDPO(policy, PPOConfig(steps=3, dirichlet_concentration=10.0, concentration_end=None), seed=0)
    assert [constant.concentration(step) for step in (1, 3)] == [10, 10]
    single = RDPO(policy, PPOConfig(steps=1, dirichlet_concentration=10.0, concentration_end=1000.0), seed=0)
    assert single.concentration(1) == 10


def test_minibatches_cover_the_batch_once():
    table = SolverTable(positions=[[0.3, 0.6]], weights=[[0.5, 0.5]])
    policy = EPDParamPolicy(table, parameterization="direct")
    learner = RDPO(policy, PPOConfig(rollout_batch_size=12, rloo_k=4, minibatch_size=3), seed=0)
    orders = set()
    for step in (1, 2):
        for epoch in (0, 1):
            parts = learner._minibatches(step, epoch, 12)
            assert [len(part) for part in parts] == [3, 3, 3, 3]
            assert sorted(torch.cat(parts).tolist()) == list(range(12))
            orders.add(tuple(torch.cat(parts).tolist()))
    assert len(orders) == 4  # another order in each epoch of each step


# --- What is written ------------------------------------------------------------------------------------------------


def test_run_folder(toy, tmp_path):
    run_toy(toy, "never", ["logging.tensorboard=true"])
    directory = only_run(tmp_path)
    metrics = lines(directory.metrics)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert [record["images"] for record in metrics] == [16, 32, 48, 64]
    always = {"reward_mean", "reward_std", "reward_group_std", "kl", "approx_kl", "clip_fraction", "entropy"}
    always |= {"ratio_mean", "grad_norm", "loss", "images_per_second", "seconds_generation", "seconds_update"}
    assert all(always <= record.keys() for record in metrics)
    assert ["eval_reward_mean" in record for record in metrics] == [False, True, False, True]
    assert metrics[3]["eval_reward_mean"] == lines(directory.evaluations)[-1]["reward_mean"]
    assert all(record["reward_min"] <= record["reward_mean"] <= record["reward_max"] for record in metrics)
    present = sorted(path.name for path in directory.checkpoint(4).parent.glob("*.pt"))
    assert present == ["policy-best.pt", "policy-step000002.pt", "policy-step000004.pt"]
    assert sorted(path.name for path in (directory.path / "samples").iterdir()) == [
        "step000000.png",
        "step000002.png",
        "step000004.png",
    ]
    assert list(directory.tensorboard.glob("events.out.tfevents.*"))
    config = load_config(directory.config)
    assert config.ppo.rollout_batch_size == 16
    stored = load_table(config.data.predictor_snapshot)
    assert stored.positions[0].tolist() == pytest.approx([0.335, 0.665]) and stored.schedule_type == "polynomial"
    assert not list(directory.path.rglob("*.tmp"))


def test_metric_lines_refuse_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1, "reward_mean": float("nan")})


def test_lines_after_the_checkpoint_and_torn_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\ngarbage\n{"step": 3}\n{"step": 4}\n{"step": 2')
    drop_lines_after(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_the_time_left_counts_steps_and_evaluations(capsys):
    """Evaluations take their own time, and those to come are known."""
    progress = Progress(10, 0, {0, 5, 10})
    progress.seconds["evaluation"].append(10.0)
    progress.seconds["step"] += [1.0, 3.0]
    assert progress.seconds_left(2) == 8 * 2 + 2 * 10
    assert progress.seconds_left(5) == 5 * 2 + 10 and progress.seconds_left(10) == 0
    progress.show({"step": 2, "reward_mean": 0.5, "kl": 0.1, "images_per_second": 4.0})
    assert capsys.readouterr().err == "step 2/10: reward 0.5000, kl 0.100, 4.0 images/s, 00:36 left\n"
    resumed = Progress(10, 6, {0, 5, 10})
    resumed.seconds["step"].append(2.0)
    assert resumed.seconds_left(7) == 6  # how long an evaluation takes is not known yet


# --- Ranks ----------------------------------------------------------------------------------------------------------


def test_two_ranks_draw_and_learn_the_same(toy, tmp_path):
    run_toy(toy, "never", [])
    alone = only_run(tmp_path)
    pair = run_program(toy, "never", f"run.output_root={tmp_path}/pair", ranks=2)
    assert pair.returncode == 0, pair.stderr
    directory = only_run(tmp_path, "pair")
    assert_same_policy(final_state(alone), final_state(directory))
    assert_same_logs(alone, directory)
    for step in (0, 2, 4):
        assert alone.sample_grid(step).read_bytes() == directory.sample_grid(step).read_bytes()


# --- Interruption and resuming --------------------------------------------------------------------------------------


class SignalAfter(ToyReward):
    """The toy reward; sends this process a signal while the `calls`-th rollout is scored."""

    def __init__(self, calls, signum):
        super().__init__()
        self.left, self.signum = calls, signum

    def score(self, images, prompts):
        if len(prompts) == 16:  # a rollout, not an evaluation
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signum)
        return super().score(images, prompts)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_resumed_run_equals_an_undisturbed_one(toy, tmp_path, signum):
    options = ["ppo.steps=6", "policy.parameterization=mlp", "ppo.minibatch_size=4"]
    run_toy(toy, "never", [*options, f"run.output_root={tmp_path}/undisturbed"])
    undisturbed = only_run(tmp_path, "undisturbed")

    models = Models(ToyDenoiser(), RewardMix.of(SignalAfter(3, signum)), toy_models().metrics)
    assert run_toy(toy, "auto", options, models) == signum
    directory = only_run(tmp_path)
    assert directory.latest_checkpoint() == directory.checkpoint(3)
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)

    # As if the run had gone on for a while after its last checkpoint, and died in the middle of a line.
    with open(directory.metrics, "a") as file:
        file.write('{"step": 4, "reward_mean": 99}\n{"step": 5, "rew')
    assert run_toy(toy, "auto", options) == 0
    assert only_run(tmp_path) == directory
    assert_same_policy(final_state(undisturbed), final_state(directory))
    assert_same_logs(undisturbed, directory)


def test_a_second_signal_takes_effect_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def open_and_close(config_path, overrides, resume):
    """What `open_run` chooses: folder and checkpoint."""
    config = load_config(config_path, overrides)
    with open_run(config, toy_inputs(config).start, resume) as (directory, checkpoint):
        return directory, checkpoint


def test_auto_continues_only_an_equal_run(toy, tmp_path):
    stop_early = Models(ToyDenoiser(), RewardMix.of(SignalAfter(3, signal.SIGTERM)), toy_models().metrics)
    run_toy(toy, "never", [], stop_early)
    unfinished = only_run(tmp_path)
    assert open_and_close(toy, [], "auto") == (unfinished, unfinished.checkpoint(3))
    lighter = ["ppo.rollout_micro_batch=4", "logging.log_interval=2"]
    assert open_and_close(toy, lighter, "auto") == (unfinished, unfinished.checkpoint(3))
    assert load_config(unfinished.config).ppo.rollout_micro_batch == 4
    others = (["ppo.learning_rate=0.01"], ["run.seed=1"], ["run.run_name=oy"], ["model.num_points=3"], ["ppo.steps=9"])
    for other in others:
        directory, checkpoint = open_and_close(toy, other, "auto")
        assert directory != unfinished and checkpoint is None
    config = load_config(toy)
    start = toy_inputs(config).start
    with open_run(config, start, "auto") as (first, _), open_run(config, start, "auto") as (second, checkpoint):
        assert first == unfinished
        assert second != unfinished and checkpoint is None  # the first one is in use
    run_toy(toy, str(unfinished.path), [])
    assert open_and_close(toy, [], "auto") == (unfinished, unfinished.checkpoint(4))  # finished: nothing is left to do
    before = unfinished.metrics.read_bytes()
    assert run_toy(toy, "auto", []) == 0
    assert unfinished.metrics.read_bytes() == before


def test_resume_by_name(toy, tmp_path):
    run_toy(toy, "never", [])
    directory = only_run(tmp_path)
    with pytest.raises(RunError, match=r"other values of ppo\.learning_rate, evaluation\.seed; use the same"):
        open_and_close(toy, ["ppo.learning_rate=0.01", "evaluation.seed=7", "ppo.steps=9"], str(directory.path))
    with pytest.raises(RunError, match="the start table"):
        other = SolverTable(positions=[[0.2, 0.6]] * 3, weights=[[0.5, 0.5]] * 3)
        with open_run(load_config(toy), other, str(directory.path)):
            pass
    assert run_toy(toy, str(directory.path), ["ppo.steps=6", "logging.save_interval=1"]) == 0
    assert final_state(directory)["step"] == 6 and [r["step"] for r in lines(directory.metrics)] == [1, 2, 3, 4, 5, 6]
    assert load_config(directory.config).ppo.steps == 6
    assert only_run(tmp_path) == directory
    with pytest.raises(RunError, match="not a run folder"):
        open_and_close(toy, [], str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_resumed_run_knows_the_best_so_far(toy, tmp_path):
    run_toy(toy, "never", [])
    directory = only_run(tmp_path)
    unreachable = {"reward": torch.ones(6, dtype=torch.float64), "toy_spread": torch.ones(6, dtype=torch.float64)}
    guard = {"best_step": 2, "best_scores": unreachable, "peak_step": 2, "peak_scores": unreachable, "consecutive": 0}
    save_checkpoint(directory.checkpoint(4), {**final_state(directory), "guard": guard})
    kept = directory.best_checkpoint.read_bytes()
    run_toy(toy, str(directory.path), ["ppo.steps=6"])
    assert final_state(directory)["guard"]["best_step"] == 2
    assert directory.best_checkpoint.read_bytes() == kept


def test_a_checkpoint_of_another_run_is_refused(toy, tmp_path):
    run_toy(toy, "never", [])
    directory = only_run(tmp_path)
    checkpoint = directory.checkpoint(4)
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        run_toy(toy, str(directory.path), ["ppo.steps=5"])
    table = SolverTable(positions=[[0.2, 0.6]] * 3, weights=[[0.5, 0.5]] * 3, schedule_type="polynomial")
    other = EPDParamPolicy(table)
    runner = EPDRolloutRunner(ToyDenoiser(), toy_models().mix, ["a"], table, PPOConfig(), seed=0)
    trainer = PPOTrainer(Config(), other, runner, None, directory)
    with pytest.raises(CheckpointError, match="another start table"):
        trainer.resume(directory.checkpoint(2))


# --- The command, on the embedded model -----------------------------------------------------------------------------

SMALL = [
    "ppo.rollout_batch_size=4",
    "ppo.rloo_k=2",
    "model.num_steps=3",
    "evaluation.num_prompts=2",
    "evaluation.interval=50",
]


def start_command(root, *arguments, ranks=1):
    command = [
        sys.executable,
        *torchrun(ranks),
        "-m",
        "training.ppo.launch",
        "--config",
        "training/ppo/cfgs/embedded.yaml",
    ]
    for override in (*SMALL, f"run.output_root={root}/exps"):
        command += ["--override", override]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": "29555"}
    return subprocess.Popen(
        [*command, "--device", "cpu", *arguments], cwd=REPOSITORY, env=environment, text=True, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_command_stops_on_sigterm_and_goes_on(tmp_path):
    running = start_command(tmp_path, "--override", "ppo.steps=1000")
    while "step 2/1000" not in (line := running.stderr.readline()):
        assert line, "the run ended before its second step"
    running.send_signal(signal.SIGTERM)
    _, messages = running.communicate(timeout=60)
    assert running.returncode == 143, messages
    assert "SIGTERM: finishing this step and saving" in messages and "Traceback" not in messages
    directory = only_run(tmp_path)
    done = final_state(directory)["step"]
    assert [record["step"] for record in lines(directory.metrics)] == list(range(1, done + 1))

    steps = f"ppo.steps={done + 1}"
    again = start_command(tmp_path, "--override", steps, "--resume", str(directory.path), ranks=2)
    _, messages = again.communicate(timeout=120)
    assert again.returncode == 0, messages
    assert final_state(directory)["step"] == done + 1
    last = lines(directory.metrics)[-1]
    assert last["step"] == done + 1 and "eval_emoji_heldout_mean" in last
    assert list(directory.tensorboard.iterdir())
