"""What is measured: the settings, and the lines (algorithm, start table, configuration) that are compared in each.

Nothing here needs torch, so that mistakes on the command line are found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omegaconf import OmegaConf

from training.ppo.config import Config, check_values, flatten

TRAIN_PROMPTS = "src/prompts/emoji_train.txt"
EVAL_PROMPTS = "src/prompts/emoji_eval.txt"
REWARD, HELD_OUT = "emoji_reward", "emoji_heldout"
VARIANT_IMAGES = 1024  # budget of the part "variants"
ROBUSTNESS_STEPS = 20
PILOT_PROMPTS = 256  # training prompts whose difficulty is measured before training, where prompts are stratified


@dataclass(frozen=True)
class Setting:
    """A table to be learned and the conditions that it is for."""

    name: str
    guidance: float
    num_steps: int  # nodes
    num_points: int = 2
    scales: bool = False  # train scale_dir and scale_time too
    schedule: str = "discrete"  # type of the grid of noise levels, rho 1

    @property
    def intervals(self) -> int:
        return self.num_steps - 1

    @property
    def title(self) -> str:
        scales = ", scales trained" if self.scales else ""
        grid = "" if self.schedule == "discrete" else f", {self.schedule}"
        return f"guidance {self.guidance:g}, {self.intervals} intervals, K={self.num_points}{scales}{grid}"

    def overrides(self) -> list[str]:
        return [
            f"data.prompt_csv={TRAIN_PROMPTS}",
            f"evaluation.prompt_file={EVAL_PROMPTS}",
            "model.dataset_name=emoji",
            f"model.guidance_rate={self.guidance}",
            f"model.schedule_type={self.schedule}",
            f"model.num_steps={self.num_steps}",
            f"model.num_points={self.num_points}",
            f"reward.type={REWARD}",
            f"evaluation.metrics=[{HELD_OUT}]",
            f"ppo.train_scale_dir={str(self.scales).lower()}",
            f"ppo.train_scale_time={str(self.scales).lower()}",
        ]


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("a", guidance=7.5, num_steps=6),
        Setting("b", guidance=7.5, num_steps=11),
        Setting("c", guidance=3.0, num_steps=6),
        Setting("d", guidance=7.5, num_steps=6, num_points=3, scales=True),
        Setting("e", guidance=7.5, num_steps=6, schedule="logsnr"),
    )
}


@dataclass(frozen=True)
class Line:
    """One thing to compare. `label` and `start` together are unique within a part."""

    label: str
    algorithm: str = "rdpo"  # a key of learning_runs.ALGORITHMS
    start: str = "cold"  # a name of learning_starts.StartTables
    overrides: tuple[str, ...] = ()  # of the configuration, after the setting's
    images: int | None = None  # training images; None: what the part spends
    steps: int | None = None  # instead of `images`


def run_config(setting: Setting, line: Line, seed: int, images: int, eval_prompts: int) -> Config:
    """The production configuration of one run; what no override names is at its default."""
    wanted = [*setting.overrides(), f"run.seed={seed}", f"evaluation.num_prompts={eval_prompts}", *line.overrides]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist(wanted)))
    budget = images if line.images is None else min(line.images, images)
    config.ppo.steps = line.steps or max(1, budget // config.ppo.rollout_batch_size)
    check_values(config)
    return config


# ----------------------------------------------------------------------------
# The lines of each part.

# The published algorithm: advantages across prompts, a residual MLP, one pass in minibatches of 4, 8 images on a GPU.
REFERENCE = (
    *("ppo.baseline=legacy_mixed", "ppo.normalize_advantages=true", "ppo.shared_noise=false"),
    *("policy.parameterization=mlp", "ppo.learning_rate=7e-5", "ppo.learning_rate_schedule=constant"),
    *("ppo.ppo_epochs=1", "ppo.minibatch_size=4", "ppo.rollout_batch_size=8", "ppo.rloo_k=4"),
    *("ppo.dirichlet_concentration=20", "ppo.concentration_end=null"),
)
CMAES = ("ppo.rollout_batch_size=64", "ppo.rloo_k=16")  # 16 tables on 4 prompts
# A round begins with 16 tables.
HALVING = ("ppo.rollout_batch_size=32", "ppo.rloo_k=16", "ppo.dirichlet_concentration=20")
# RDPO from a distilled table, as the Stable Diffusion presets have it; the defaults are for the cold start.
NEAR = ("ppo.dirichlet_concentration=50", "ppo.concentration_end=null")
PATHWISE = {
    "cold": ("ppo.rollout_batch_size=8", "ppo.rloo_k=2", "pathwise.learning_rate=0.4"),
    "distilled": ("ppo.rollout_batch_size=8", "ppo.rloo_k=2", "pathwise.learning_rate=0.03"),
}
SCALE_DIR = ("ppo.train_scale_dir=true",)
NO_SCALES = ("ppo.train_scale_dir=false", "ppo.train_scale_time=false")
PATHWISE_IMAGES = {"cold": 512, "distilled": 256}  # budgets: a gradient costs three images' time or more
SHORT = 512  # images of the RDPO lines that must be done early
LONG = 1024  # of the pathwise line that may take its time
ALL_SCALES = ("ppo.train_scale_dir=true", "ppo.train_scale_time=true")


def curve_lines(setting: Setting) -> list[Line]:
    """The main comparison. Setting a has all of it, the others the lines that matter most there."""
    full = setting.name == "a"
    lines = [Line("rdpo"), Line("reference", overrides=REFERENCE), Line("cmaes", "cmaes", overrides=CMAES)]
    if full:
        lines += [Line("halving", "halving", overrides=HALVING), Line(f"rdpo, {SHORT} images", images=SHORT)]
        lines.append(_pathwise("pathwise", "cold"))
    distilled = [_near("rdpo, near"), Line("rdpo")]
    if full:
        distilled.append(_near(f"rdpo, near, {SHORT} images", images=SHORT))
        distilled.append(Line("cmaes", "cmaes, near", overrides=CMAES))
    if setting.scales:
        distilled += [_pathwise("pathwise", "distilled"), _pathwise("pathwise, no scales", "distilled", NO_SCALES)]
    else:
        distilled.append(_near("rdpo, near, scale_dir", SCALE_DIR))
        distilled.append(_pathwise("pathwise, scale_dir", "distilled", SCALE_DIR))
        batch = (*SCALE_DIR, "ppo.rollout_batch_size=32")
        distilled.append(_pathwise(f"pathwise, scale_dir, {LONG} images", "distilled", batch, LONG))
        if setting.intervals < 10:
            distilled.append(_pathwise("pathwise", "distilled"))
            distilled.append(_pathwise("pathwise, all scales", "distilled", ALL_SCALES))
    return lines + [replace(line, start="distilled") for line in distilled]


def _near(label: str, overrides: tuple[str, ...] = (), images: int | None = None) -> Line:
    return Line(label, start="distilled", overrides=(*NEAR, *overrides), images=images)


def _pathwise(label: str, start: str, overrides: tuple[str, ...] = (), images: int | None = None) -> Line:
    return Line(label, "pathwise", start, (*PATHWISE[start], *overrides), images or PATHWISE_IMAGES[start])


CHANGES = {
    "unshared noise": ("ppo.shared_noise=false",),
    "no normalisation": ("ppo.normalize_advantages=false",),
    "constant learning rate": ("ppo.learning_rate_schedule=constant",),
    "concentration 20": ("ppo.dirichlet_concentration=20", "ppo.concentration_end=null"),
    "concentration 50": ("ppo.dirichlet_concentration=50", "ppo.concentration_end=null"),
    "concentration 100": ("ppo.dirichlet_concentration=100", "ppo.concentration_end=null"),
    "concentration 100, learning rate 0.05": (
        *("ppo.dirichlet_concentration=100", "ppo.concentration_end=null"),
        "ppo.learning_rate=0.05",
    ),
    "concentration 50 to 200": ("ppo.dirichlet_concentration=50", "ppo.concentration_end=200"),
    "learning rate 0.05": ("ppo.learning_rate=0.05",),
    "learning rate 0.2": ("ppo.learning_rate=0.2",),
    "mlp, learning rate 0.005": ("policy.parameterization=mlp", "ppo.learning_rate=0.005"),
    "rloo_k 2": ("ppo.rloo_k=2",),
    "rloo_k 8": ("ppo.rloo_k=8",),
}
# Those that are not configuration: algorithm of learning_variants -> overrides that belong to it.
EXTENSIONS = {
    "antithetic": (),
    "sobol": (),
    "stratified": (),
    "one interval": (),
    "crossed": (),
    "group normalised": (),
    "kl stop": ("ppo.ppo_epochs=8",),
    "fisher": (),
}


# Of pathwise with trained scale_dir, from the distilled table.
PATHWISE_CHANGES = {
    "learning rate 0.01": ("pathwise.learning_rate=0.01",),
    "learning rate 0.1": ("pathwise.learning_rate=0.1",),
    "16 images a step": ("ppo.rollout_batch_size=16",),
    "32 images a step": ("ppo.rollout_batch_size=32",),
}


def variant_lines(setting: Setting) -> list[Line]:
    """RDPO at its defaults, and with one thing changed each; a change that changes nothing is left out. The same for
    pathwise."""
    lines = []
    for base in (Line("rdpo"), _near("rdpo, near")):
        base = replace(base, images=VARIANT_IMAGES)
        lines.append(base)
        settled = _values(setting, base)
        for label, overrides in CHANGES.items():
            line = replace(base, label=label, overrides=(*base.overrides, *overrides))
            if _values(setting, line) != settled:
                lines.append(line)
        lines += [
            replace(base, label=name, algorithm=name, overrides=(*base.overrides, *extra))
            for name, extra in EXTENSIONS.items()
        ]
    cold, distilled = _pathwise("pathwise", "cold"), _pathwise("pathwise", "distilled", SCALE_DIR)
    lines += [cold, distilled]
    for label, overrides in PATHWISE_CHANGES.items():
        lines.append(replace(distilled, label=f"pathwise, {label}", overrides=(*distilled.overrides, *overrides)))
    return lines + [replace(line, label="pathwise, plain mean", algorithm="plain mean") for line in (cold, distilled)]


def _values(setting: Setting, line: Line) -> dict[str, object]:
    return flatten(run_config(setting, line, seed=0, images=VARIANT_IMAGES, eval_prompts=1))


# First and last concentration, learning rate, and what else is changed.
SCHEDULES = {
    "10 to 100, 0.2": (10, 100, 0.2),
    "10 to 200, 0.2": (10, 200, 0.2),
    "20 to 100, 0.1": (20, 100, 0.1),
    "20, 0.2": (20, "null", 0.2),
    "10 to 100, 0.1, no normalisation": (10, 100, 0.1, "ppo.normalize_advantages=false"),
    "10 to 100, 0.2, no normalisation": (10, 100, 0.2, "ppo.normalize_advantages=false"),
    "10 to 100, mlp, 0.005": (10, 100, 0.005, "policy.parameterization=mlp"),
}


def schedule_lines(setting: Setting) -> list[Line]:
    """RDPO from the cold start with other schedules of exploration and learning rate, on the budget of the curves."""
    lines = []
    for label, (first, last, rate, *others) in SCHEDULES.items():
        concentrations = (f"ppo.dirichlet_concentration={first}", f"ppo.concentration_end={last}")
        lines.append(Line(label, overrides=(*concentrations, f"ppo.learning_rate={rate}", *others)))
    return lines


STARTS = ("cold", "optimal", "distilled", "distilled, no scale", "distilled, dpmpp", "distilled, heun")


def start_lines(setting: Setting) -> list[Line]:
    """The two algorithms from every kind of start table."""
    lines = []
    for start in STARTS:
        if start.startswith("distilled"):
            pair = [_near("rdpo, near"), _pathwise("pathwise", "distilled", SCALE_DIR)]
        else:
            pair = [Line("rdpo"), _pathwise("pathwise", "cold", SCALE_DIR)]
        lines += [replace(line, start=start) for line in pair]
    return lines


def robustness_lines(setting: Setting) -> list[Line]:
    """Other numbers of images a step: RDPO at its defaults from both start tables, as the presets have it from the
    distilled one, and pathwise.

    From the cold start as many steps as 2,048 images take, where that is more than ROBUSTNESS_STEPS.
    """
    lines = []
    for size in (8, 32, 128, 512):
        batch = (f"ppo.rollout_batch_size={size}",)
        steps = max(ROBUSTNESS_STEPS, 2048 // size)
        lines += [
            Line(f"rdpo, {size} images a step", start="cold", overrides=batch, steps=steps),
            Line(f"rdpo, {size} images a step", start="distilled", overrides=batch, steps=ROBUSTNESS_STEPS),
            replace(_near(f"rdpo, near, {size} images a step", batch), steps=ROBUSTNESS_STEPS),
            replace(
                _pathwise(f"pathwise, {size} images a step", "distilled", (*SCALE_DIR, *batch)), steps=ROBUSTNESS_STEPS
            ),
        ]
    return lines


TRAINED = {
    "curves": curve_lines,
    "schedules": schedule_lines,
    "variants": variant_lines,
    "starts": start_lines,
    "robustness": robustness_lines,
}
# The settings that a part is measured in; a part that is not here is measured in all.
ONLY = {
    "schedules": ("a", "d", "e"),
    "variants": ("a", "e"),
    "robustness": ("a", "c"),
    "transfer": ("a",),
    "time": ("a",),
}
PARTS = ("references", "curves", "schedules", "variants", "starts", "robustness", "transfer", "time")


def jobs(parts: Sequence[str], settings: Sequence[str]) -> list[tuple[str, Setting]]:
    """(part, setting) of everything to measure."""
    return [(part, SETTINGS[name]) for part in parts for name in settings if name in ONLY.get(part, SETTINGS)]
