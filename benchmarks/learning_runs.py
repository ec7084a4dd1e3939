"""The measurements: training runs in lockstep, baselines, transfer to other conditions, and time."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from benchmarks.learning_lines import (
    EVAL_PROMPTS,
    HELD_OUT,
    PILOT_PROMPTS,
    REWARD,
    TRAIN_PROMPTS,
    TRAINED,
    Line,
    Setting,
    curve_lines,
    run_config,
)
from benchmarks.learning_lockstep import (
    BatchScorer,
    Judge,
    Lockstep,
    Progress,
    Run,
    Stepper,
    crews,
    images_of,
    run_row,
    score_lists,
    table_lists,
)
from benchmarks.learning_models import BatchDenoiser, BatchReward, load_denoiser
from benchmarks.learning_rivals import CMAES, NEAR_SIGMA, SuccessiveHalving
from benchmarks.learning_starts import Start, StartTables, made_for, stretch
from benchmarks.learning_variants import (
    AntitheticPolicy,
    CrossedPolicy,
    Fisher,
    GroupNormalised,
    OneIntervalPolicy,
    PlainMean,
    SobolPolicy,
    StopByKL,
    Stratified,
    variant_policy,
)
from benchmarks.results import Part
from solvers import SOLVERS
from torch_utils.errors import UserError
from training.denoisers import create_model
from training.generate import generate_batch, table_schedule
from training.ppo.config import Config
from training.ppo.evaluation import MeanTableEvaluator
from training.ppo.inputs import split_prompts
from training.ppo.pathwise import Pathwise
from training.ppo.policy import EPDParamPolicy, create_policy
from training.ppo.ppo_trainer import create_learner
from training.ppo.rdpo import RDPO
from training.ppo.reward_mix import RewardMix
from training.ppo.reward_multi import create_reward
from training.ppo.rl_runner import EPDRolloutRunner
from training.solver_table import SolverTable

SOLVER_CALLS = (10, 20, 50)  # sequential network calls of the baselines
BASELINES = {"ddim": 1, "dpmpp": 1, "unipc": 1, "ipndm": 1, "heun": 2}  # solver -> calls of an interval
TRANSFER_GUIDANCE = (3.0, 5.0, 6.0, 7.5, 9.0, 10.0)
TRANSFER_INTERVALS = (4, 5, 6, 7, 8)
TRANSFERRED = (("rdpo", "cold"), ("rdpo, near", "distilled"), ("pathwise, scale_dir", "distilled"))
TIMED = ("rdpo", "reference", "cmaes", "halving", "pathwise")
TIMED_STEPS = 5  # after one that is not counted
TIMED_BATCH = 32


class Workbench:
    """The models on one device, and what is shared by the measurements."""

    def __init__(self, device: str, precision: str, eval_prompts: int, chunk: int, gradient_chunk: int):
        self.device, self.precision, self.eval_prompts = device, precision, eval_prompts
        self.chunk, self.gradient_chunk = chunk, gradient_chunk
        self.nets: dict[float, BatchDenoiser] = {}
        self.rewards = [BatchReward(name, torch.device(device)) for name in (REWARD, HELD_OUT)]

    def net(self, guidance: float) -> BatchDenoiser:
        if not self.nets:
            self.nets[guidance] = load_denoiser(self.device, self.precision, guidance)
        if guidance not in self.nets:
            self.nets[guidance] = next(iter(self.nets.values())).at(guidance)
        return self.nets[guidance]

    def starts(self, setting: Setting) -> StartTables:
        return StartTables(setting, self.net(setting.guidance), self.eval_prompts)

    def judge(self, setting: Setting) -> Judge:
        """The production evaluation of tables of a setting."""
        config = run_config(setting, Line("judge"), 0, 1024, self.eval_prompts)
        _, prompts = split_prompts(config)
        cold = self.starts(setting).get("cold", 0).table
        trained, *metrics = self.rewards
        evaluator = MeanTableEvaluator(
            self.net(setting.guidance), RewardMix.of(trained), metrics, prompts, cold, config.evaluation, None
        )
        return Judge(BatchScorer(evaluator.scorer, self.chunk, 1), evaluator.prompts, evaluator.seeds)


def part_settings(part: str, setting: Setting, images: int, bench: Workbench) -> dict:
    """What all rows of a part share."""
    return {
        "setting": setting.name,
        "title": setting.title,
        "guidance_rate": setting.guidance,
        "num_steps": setting.num_steps,
        "num_points": setting.num_points,
        "scales": setting.scales,
        "schedule": f"{setting.schedule}, rho 1",
        "precision": "float32" if part == "time" else bench.precision,
        "images": images,
        "training_prompts": TRAIN_PROMPTS,
        "evaluation": f"the first {bench.eval_prompts} prompts of {EVAL_PROMPTS}, one noise each",
        "metrics": {"reward": REWARD, "heldout": HELD_OUT},
    }


# ----------------------------------------------------------------------------
# Algorithms. Each builder gives the learner and where its mean table comes from.

Built = tuple[Stepper, Callable[[], SolverTable]]


def build_production(config: Config, start: SolverTable) -> Built:
    policy = create_policy(config, start)
    return create_learner(config, policy), policy.mean_table


def build_pathwise(kind: type[Pathwise]) -> Callable[[Config, SolverTable], Built]:
    def build(config: Config, start: SolverTable) -> Built:
        policy = create_policy(config, start)
        return kind(policy, config.ppo, config.pathwise), policy.mean_table

    return build


def build_rival(kind: Callable[..., CMAES | SuccessiveHalving]) -> Callable[[Config, SolverTable], Built]:
    def build(config: Config, start: SolverTable) -> Built:
        rival = kind(start, config.ppo, config.run.seed)
        return rival, rival.mean_table

    return build


def build_drawn(kind: type[EPDParamPolicy]) -> Callable[[Config, SolverTable], Built]:
    """RDPO with another policy."""

    def build(config: Config, start: SolverTable) -> Built:
        policy = variant_policy(kind, config, start)
        return RDPO(policy, config.ppo, config.run.seed), policy.mean_table

    return build


def build_updated(kind: type[RDPO]) -> Callable[[Config, SolverTable], Built]:
    """RDPO with another update."""

    def build(config: Config, start: SolverTable) -> Built:
        policy = create_policy(config, start)
        return kind(policy, config.ppo, config.run.seed), policy.mean_table

    return build


def build_stratified(config: Config, start: SolverTable) -> Built:
    policy = create_policy(config, start)
    return Stratified(policy, config.ppo, config.run.seed, PILOT_PROMPTS), policy.mean_table


ALGORITHMS: dict[str, Callable[[Config, SolverTable], Built]] = {
    "rdpo": build_production,
    "pathwise": build_pathwise(Pathwise),
    "plain mean": build_pathwise(PlainMean),
    "cmaes": build_rival(CMAES),
    "cmaes, near": build_rival(functools.partial(CMAES, sigma=NEAR_SIGMA)),
    "halving": build_rival(SuccessiveHalving),
    "antithetic": build_drawn(AntitheticPolicy),
    "sobol": build_drawn(SobolPolicy),
    "crossed": build_drawn(CrossedPolicy),
    "one interval": build_drawn(OneIntervalPolicy),
    "stratified": build_stratified,
    "group normalised": build_updated(GroupNormalised),
    "kl stop": build_updated(StopByKL),
    "fisher": build_updated(Fisher),
}


def create_run(config: Config, line: Line, start: Start, bench: Workbench, prompts: Sequence[str]) -> Run:
    """One run, before its first step."""
    learner, mean_table = ALGORITHMS[line.algorithm](config, start.table)
    net = bench.net(config.model.guidance_rate)
    runner = EPDRolloutRunner(net, RewardMix.of(bench.rewards[0]), prompts, start.table, config.ppo, config.run.seed)
    return Run(line, config.run.seed, learner, mean_table, runner, config.ppo.steps, start.images)


# ----------------------------------------------------------------------------
# Parts.


def measure_training(
    part: Part,
    name: str,
    setting: Setting,
    bench: Workbench,
    seeds: Sequence[int],
    images: int,
    chosen: Callable[[Line], bool],
    say: Callable[[str], None],
) -> None:
    """Add the missing rows of "curves", "variants", "starts" or "robustness"."""
    lines = [line for line in TRAINED[name](setting) if chosen(line)]
    wanted = [
        (line, seed) for line in lines for seed in seeds if not part.has(line=line.label, start=line.start, seed=seed)
    ]
    if not wanted:
        return
    judge, starts = bench.judge(setting), bench.starts(setting)
    judge_starts(part, judge, starts, wanted, lambda text: say(f"{part.record['settings']['title']}: {text}"))
    runs = []
    for line, seed in wanted:
        config = run_config(setting, line, seed, images, bench.eval_prompts)
        training, _ = split_prompts(config)
        runs.append(create_run(config, line, starts.get(line.start, seed), bench, training))
    progress = Progress(part.record["settings"]["title"], sum(images_of(run, bench.eval_prompts) for run in runs), say)
    scorer = BatchScorer(runs[0].runner.scorer, bench.chunk, bench.gradient_chunk)
    for crew in crews(runs, bench.chunk, bench.gradient_chunk):
        Lockstep(scorer, judge, progress).run(crew)
        for run in crew:
            part.add(run_row(run))


def judge_starts(
    part: Part, judge: Judge, starts: StartTables, wanted: Sequence[tuple[Line, int]], say: Callable[[str], None]
) -> None:
    """Keep the scores, the cost and the numbers of every start table that is used; of the cold one in any case."""
    keys = [("cold", 0), *((line.start, seed) for line, seed in wanted)]
    for name, seed in dict.fromkeys(keys):
        key = f"{name}, seed {seed}"
        if key in part.references or (name in ("cold", "optimal") and name in part.references):
            continue
        say(f"start table {key}")
        start = starts.get(name, seed)
        part.references[name if name in ("cold", "optimal") else key] = {
            **judged(judge, start.table),
            "start_images": start.images,
            "seconds": start.seconds,
            "errors": start.errors,
            "table": table_lists(start.table),
        }


def judged(judge: Judge, table: SolverTable) -> dict:
    """Means and scores of one table. Raises UserError for a reward that is not a number."""
    [scores] = judge.scores([table])
    if isinstance(scores, UserError):
        raise scores
    reward, heldout = scores.mean(0).tolist()
    return {"reward": reward, "heldout": heldout, "scores": score_lists(scores)}


def measure_references(part: Part, setting: Setting, bench: Workbench) -> None:
    """Add the missing baselines, judged on the same prompts and noises as the tables."""
    judge = bench.judge(setting)
    for solver in BASELINES:
        for calls in SOLVER_CALLS:
            if not part.has(solver=solver, calls=calls):
                part.add({"solver": solver, "calls": calls, **judged_solver(judge, setting, bench, solver, calls)})


def judged_solver(judge: Judge, setting: Setting, bench: Workbench, solver: str, calls: int) -> dict:
    """As `judged`, for a solver without table that makes `calls` sequential network calls."""
    net = bench.net(setting.guidance)
    cold = bench.starts(made_for(setting, setting.guidance, calls // BASELINES[solver])).get("cold", 0).table
    images = generate_batch(net, judge.prompts, judge.seeds, SOLVERS[solver], table_schedule(cold, net))
    scores = judge.scorer.scorer.scores(images, judge.prompts)
    reward, heldout = scores.mean(0).tolist()
    return {"reward": reward, "heldout": heldout, "scores": score_lists(scores)}


def measure_transfer(part: Part, setting: Setting, bench: Workbench, curves: Mapping | None) -> None:
    """Add how the best learned tables of the setting do under other conditions, beside tables made for those.

    `curves`: the part "curves" of the setting. Raises UserError without it.
    """
    if curves is None:
        raise UserError(f"--parts transfer needs the part curves_{setting.name} in the same --outdir; measure it first")
    tables = best_tables(curves["rows"], bench.starts(setting))
    conditions = [("guidance", value, made_for(setting, value, setting.intervals)) for value in TRANSFER_GUIDANCE]
    conditions += [("intervals", value, made_for(setting, setting.guidance, value)) for value in TRANSFER_INTERVALS]
    for kind, value, condition in conditions:
        if part.has(kind=kind, value=value):
            continue
        judge, starts = bench.judge(condition), bench.starts(condition)
        own = starts.get("distilled", 0)
        here = {name: stretch(table, condition.intervals) for name, table in tables.items()}
        here |= {"cold": starts.get("cold", 0).table, "distilled for this condition": own.table}
        rows = [{"table": name, **judged(judge, table)} for name, table in here.items()]
        calls = 2 * condition.intervals
        rows.append({"table": "DDIM, as many calls", **judged_solver(judge, condition, bench, "ddim", calls)})
        for row in rows:
            part.add({"kind": kind, "value": value, **row})


def best_tables(rows: Sequence[Mapping], starts: StartTables) -> dict[str, SolverTable]:
    """Label -> table: the distilled one, and of each line in TRANSFERRED that of the run with the best final reward."""
    tables = {"distilled": starts.get("distilled", 0).table}
    cold = starts.get("cold", 0).table
    for line, start in TRANSFERRED:
        runs = [row for row in rows if (row["line"], row["start"]) == (line, start) and row["table"]]
        if runs:
            best = max(runs, key=lambda row: row["curve"][-1][1])
            arrays = {name: torch.tensor(part, dtype=torch.float64) for name, part in best["table"].items()}
            tables[f"{line}, from {start}"] = replace(cold, **arrays)
    return tables


def measure_time(part: Part, setting: Setting, bench: Workbench, say: Callable[[str], None]) -> None:
    """Add the missing rows: seconds per training image by the production path, one run alone, in float32."""
    lines = {line.label: line for line in curve_lines(setting) if line.start == "cold"}
    wanted = [lines[label] for label in TIMED if not part.has(line=label)]
    if not wanted:
        return
    net = create_model("emoji", guidance_rate=setting.guidance, device=bench.device)
    mix = RewardMix.of(create_reward(REWARD, device=bench.device))
    cold = bench.starts(setting).get("cold", 0).table
    for line in wanted:
        batch = f"ppo.rollout_batch_size={TIMED_BATCH}"
        sized = replace(line, steps=TIMED_STEPS + 1, overrides=(*line.overrides, batch))
        config = run_config(setting, sized, 0, 1024, bench.eval_prompts)
        training, _ = split_prompts(config)
        learner, _ = ALGORITHMS[line.algorithm](config, cold)
        runner = EPDRolloutRunner(net, mix, training, cold, config.ppo, 0)
        part.add({"line": line.label, **timed(learner, runner)})
        say(f"time: {line.label}, {part.rows[-1]['seconds_per_image']:.4f} s per image")


def timed(learner: Stepper, runner: EPDRolloutRunner) -> dict:
    """Median seconds per image of TIMED_STEPS steps: in all, and of that making the draw, rollout and update."""
    laps = []
    for step in range(1, TIMED_STEPS + 2):
        times = [time.perf_counter()]
        draw = learner.draw(runner, step)
        times.append(time.perf_counter())
        rollout = runner.rollout(draw, learner.needs_gradients)
        times.append(time.perf_counter())
        learner.update(step, rollout)
        times.append(time.perf_counter())
        laps.append([(last - first) / len(draw.prompts) for first, last in pairwise(times)])
    draws, rollouts, updates = zip(*laps[1:], strict=True)
    return {
        "images_per_step": runner.batch_size,
        "seconds_per_image": statistics.median(sum(lap) for lap in laps[1:]),
        "seconds_draw": statistics.median(draws),
        "seconds_rollout": statistics.median(rollouts),
        "seconds_update": statistics.median(updates),
    }
