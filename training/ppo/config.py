"""The configuration of a PPO run: every key, its type, its default and its meaning, in one place.

Only click and omegaconf are needed here, so that `--help` and `--dry-run` answer without loading torch.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torch_utils.errors import UserError
from torch_utils.resources import preset_file, shipped_file
from torch_utils.untrusted import read_bounded

MAX_BYTES = 256 << 10  # of a configuration; the longest here has 4 kB
MAX_DEPTH = 20  # of sections and lists in each other
REFERENCE = re.compile(r"\$\{(\w+\.\w+)\}")  # stands for another key's value
MAX_REFERENCES = 20
MAX_TEXT, MAX_NAME = 1000, 200  # bytes of a text, and between its slashes; file systems take 255, run folders a date
# What PyYAML and OmegaConf raise for values that they cannot make sense of.
UNUSABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError, OverflowError, RecursionError)


class ConfigError(UserError):
    """A configuration that cannot be used: one line naming the key, its value and what is allowed."""


@dataclass
class RunConfig:
    output_root: str = "exps"  # run folders are made here, as <timestamp>-<run_name>
    run_name: str = "epd-ppo"  # the end of the run folder's name; a run of the same name is continued
    seed: int = 0  # every random draw of the run is derived from it
    # Of several processes: how long they wait for one that hangs before they stop and name it. More than the longest
    # that one may be late, downloads by the first process included.
    timeout_minutes: float = 30.0


@dataclass
class DataConfig:
    predictor_snapshot: str | None = None  # start table; null: the cold-start table of model.num_steps and num_points
    prompt_csv: str | None = None  # training prompts, .txt or .csv; null: the MS-COCO captions


@dataclass
class ModelConfig:
    dataset_name: str = "ms_coco"  # backbone: ms_coco (Stable Diffusion v1.5) or emoji (embedded)
    guidance_type: str = "cfg"  # classifier-free guidance, the only kind
    guidance_rate: float = 7.5  # guidance scale; 1: unguided
    schedule_type: str = "discrete"  # how the noise levels are spaced; flowmatch is for flow models
    schedule_rho: float = 1.0  # exponent of the spacing
    sigma_min: float | None = None  # last noise level; null: the lowest of the model
    sigma_max: float | None = None  # first noise level; null: the highest of the model
    num_steps: int | None = None  # nodes of the schedule (intervals + 1); null: those of the start table
    num_points: int | None = None  # intermediate points per interval; null: those of the start table
    afs: bool = False  # replace the very first slope by its analytical value
    # folder, single file, or owner/name[@revision] on the hub of the backbone's weights; null: its usual place
    model_path: str | None = None
    precision: str = "float32"  # of the backbone: float32, float16 or bfloat16
    # of the backbone on a GPU: off, default, or max; minutes that pay for thousands of images, and not for gradients
    compile: str = "off"


@dataclass
class DistillConfig:
    teacher: str = "ddim"  # solver whose trajectory the start table is fitted to (training.distill)
    teacher_steps: int = 8  # its intervals within each interval of the table
    prompts: int = 16  # training prompts, one noise each
    grid_points: int = 13  # positions tried in every interval
    max_rows: int = 64  # of a network call at most; fewer need less memory, for the same table up to rounding
    fit_scale: bool = True  # fit scale_dir, one number for each interval, too


@dataclass
class RewardComponent:
    """One of `reward.components`."""

    type: str = ""  # as reward.type, but not mixed
    weight: float = 1.0  # negative for what should fall; 0: neither loaded nor counted
    # none; clamp01: cut to [0, 1]; /N: divided by the number N; zscore: by mean and spread of the scores so far;
    # published: as the published training code does, see PUBLISHED_TRANSFORMS
    transform: str = "none"
    weights_path: str | None = None  # null: the reward's usual place


@dataclass
class RewardConfig:
    # hps, clip, aesthetic, pick, imagereward, mps, emoji_reward, emoji_heldout; mixed: the components; or a function of
    # your own as package.module:function, called with images [N, 3, H, W] in [0, 1] and N prompts, for N scores
    type: str = "hps"
    weights_path: str | None = None  # null: the reward's usual place
    batch_size: int = 32  # images per forward of the reward model
    enable_amp: bool = False  # half precision on a GPU; scores then differ in the fourth digit
    # of type mixed: sum of weight * transform(score), over the sum of the weights' sizes
    components: list[RewardComponent] = field(default_factory=list)


@dataclass
class PolicyConfig:
    parameterization: str = "direct"  # direct: one number per log-concentration; mlp: step embedding and residual MLP
    hidden_dim: int = 128  # of the mlp
    num_layers: int = 2  # of the mlp


@dataclass
class TrainerConfig:
    # rdpo: PPO with a Dirichlet policy, needs rewards only; pathwise: the reward's gradient through the solver, needs
    # rewards that can be differentiated
    algorithm: str = "rdpo"


@dataclass
class PathwiseConfig:
    learning_rate: float = 0.03  # falls linearly to zero at the last step


@dataclass
class PPOConfig:
    steps: int = 100  # training steps of the run
    # images per step over all ranks: prompts * rloo_k; pathwise takes as many prompts, one image each
    rollout_batch_size: int = 32
    rloo_k: int = 4  # tables per prompt; each is compared with the others of its prompt
    rollout_micro_batch: int | None = None  # images per network batch; null: the rank's whole share
    shared_noise: bool = True  # the tables of a prompt start from the same noise
    # prompt: leave-one-out within a prompt; legacy_mixed: the published runs' grouping across prompts
    baseline: str = "prompt"
    normalize_advantages: bool = True  # to mean 0 and standard deviation 1 over the step's images
    ppo_epochs: int = 4  # passes over the images of a step
    minibatch_size: int | None = None  # samples per optimizer step; null: the whole batch
    learning_rate: float = 0.1  # of Adam, at the first step
    learning_rate_schedule: str = "linear"  # linear: falls to zero at the last step; constant
    clip_range: float = 0.2  # the ratio of probabilities counts within 1 +- this
    kl_coef: float = 0.0  # weight of KL(policy || start policy)
    entropy_coef: float = 0.0  # weight of the policy's entropy
    max_grad_norm: float | None = 1.0  # longer gradients are shortened to it; null: no limit
    # A prompt with a score that is not a number is left out of its step; more of them in the whole run end it.
    max_dropped_groups: int = 16
    # An optimizer step whose gradient is not finite is left out; more of them in the whole run end it.
    max_skipped_updates: int = 16
    # sum of a row's concentrations at the first step; larger explores less: 50 and null from a distilled table
    dirichlet_concentration: float = 10.0
    concentration_end: float | None = 100.0  # at the last step, reached geometrically; null: stays as it is
    train_scale_dir: bool = False  # train the lengths of the steps, too; false: the start table's values stay
    train_scale_time: bool = False  # train the times told to the network, too; false: the start table's values stay
    scale_std: float = 0.05  # standard deviation of a trained scale's logarithm


@dataclass
class EvaluationConfig:
    interval: int = 10  # steps between evaluations of the mean table; 0: never
    prompt_file: str | None = None  # held-out prompts; null: the last num_prompts training prompts are held out
    num_prompts: int = 64  # the first so many of prompt_file
    seed: int = 1  # of the evaluation noise: the same at every evaluation and for every run.seed
    metrics: list[str] = field(default_factory=list)  # further rewards, reported beside the trained one
    grid_images: int = 16  # pictures per grid in samples/; 0: none
    # when the reward rises while the first of `metrics` falls (training.ppo.guard): flag it, or stop
    on_divergence: str = "flag"


@dataclass
class CheckpointsConfig:
    keep_last: int | None = None  # newest checkpoints that stay; null: all; policy-best.pt stays always
    keep_every: int | None = None  # beside them those of every so manyth step; null: none


@dataclass
class LoggingConfig:
    log_interval: int = 1  # steps between plain progress lines and TensorBoard points; metrics.jsonl has every step
    save_interval: int = 10  # steps between checkpoints
    tensorboard: bool = True  # write logs/tensorboard
    wandb: bool = False  # the same curves and pictures to Weights & Biases; needs the package wandb


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    pathwise: PathwiseConfig = field(default_factory=PathwiseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


CHOICES = {
    # solver_utils owns these names, but needs torch; a test keeps the two in step.
    "model.schedule_type": ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch"),
    "model.precision": ("float32", "float16", "bfloat16"),
    "model.compile": ("off", "default", "max"),
    # `solvers` owns these: every solver that takes no table.
    "distill.teacher": (
        *("ddim", "dpm", "dpm2", "heun", "edm"),
        *("ipndm", "ipndm_v", "deis", "dpmpp", "unipc"),
    ),
    "policy.parameterization": ("direct", "mlp"),
    "trainer.algorithm": ("rdpo", "pathwise"),
    "ppo.baseline": ("prompt", "legacy_mixed"),
    "ppo.learning_rate_schedule": ("linear", "constant"),
    "evaluation.on_divergence": ("flag", "stop"),
}
# Owned by training.denoisers and training.ppo.reward_multi, which need torch; a test keeps them in step.
BACKBONE_NAMES = ("emoji", "ms_coco")
GUIDANCE_TYPES = ("cfg",)
PUBLISHED_REWARDS = ("hps", "clip", "aesthetic", "pick", "imagereward", "mps")
REWARD_NAMES = (*PUBLISHED_REWARDS, "emoji_reward", "emoji_heldout")
CUSTOM_REWARD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # package.module:function
MIXED = "mixed"
# What the published training code makes of a score before it mixes: cut to [0, 1] after (score + shift) / divisor. Its
# ImageReward adds three standard deviations of its authors' calibration.
PUBLISHED_TRANSFORMS = {
    "hps": (0.0, 1.0),
    "clip": (0.0, 1.0),
    "aesthetic": (0.0, 10.0),
    "pick": (0.0, 26.0),
    "imagereward": (3 * 1.0333394966054072, 10.0),
}
TRANSFORMS = ("none", "clamp01", "zscore", "published")
DIVISION = re.compile(r"/\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)")
# Inclusive lower limits; a null value is not checked.
AT_LEAST = {
    "run.seed": 0,
    "model.guidance_rate": 0,
    "model.num_steps": 2,
    "model.num_points": 1,
    "distill.teacher_steps": 1,
    "distill.prompts": 1,
    "distill.grid_points": 2,
    "distill.max_rows": 1,
    "reward.batch_size": 1,
    "policy.hidden_dim": 1,
    "policy.num_layers": 0,
    "ppo.steps": 1,
    "ppo.rollout_batch_size": 2,
    "ppo.rloo_k": 2,
    "ppo.rollout_micro_batch": 1,
    "ppo.ppo_epochs": 1,
    "ppo.minibatch_size": 1,
    "ppo.kl_coef": 0,
    "ppo.entropy_coef": 0,
    "ppo.max_dropped_groups": 0,
    "ppo.max_skipped_updates": 0,
    "evaluation.interval": 0,
    "evaluation.num_prompts": 1,
    "evaluation.seed": 0,
    "evaluation.grid_images": 0,
    "checkpoints.keep_last": 1,
    "checkpoints.keep_every": 1,
    "logging.log_interval": 1,
    "logging.save_interval": 1,
}
ABOVE_ZERO = (
    "run.timeout_minutes",
    "model.schedule_rho",
    "model.sigma_min",
    "model.sigma_max",
    "ppo.learning_rate",
    "ppo.clip_range",
    "ppo.max_grad_norm",
    "ppo.dirichlet_concentration",
    "ppo.concentration_end",
    "pathwise.learning_rate",
    "ppo.scale_std",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `overrides` ("section.key=value", the value in YAML) and check what needs no other file.

    `path` may also be the name of a preset, such as `embedded`.
    Raises `ConfigError` for an unreadable file, an unknown key (naming the nearest valid one), a wrong type, or values
    that do not fit together.
    """
    path = preset_file(Path(path))
    sources = [(str(path), _read_yaml(path))]
    sources += [(f"--override {item}", _parse_override(item)) for item in overrides]
    merged = OmegaConf.structured(Config)
    for origin, source in sources:
        _check_keys(origin, source)
        try:
            if OmegaConf.select(source, "model.compile", throw_on_resolution_failure=False) is False:
                OmegaConf.update(source, "model.compile", "off")  # which YAML reads as false without quotes
            merged = OmegaConf.merge(merged, source)
            _check_references(origin, _plain(merged))
            OmegaConf.to_container(merged, resolve=True)
        except ConfigError:
            raise
        except UNUSABLE as error:
            raise ConfigError(f"{origin}: {_describe(error)}") from error
    try:
        config = cast(Config, OmegaConf.to_object(merged))  # as which `merged` began
        flatten(config)  # looks at the elements of lists, too
        _check_lengths(path, OmegaConf.to_container(merged, resolve=True))
    except ConfigError:
        raise
    except UNUSABLE as error:
        raise ConfigError(f"{path}: {_describe(error)}") from error
    check_values(config)
    return config


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
        _check_yaml(text)
        source = OmegaConf.load(io.StringIO(text))
    except UNUSABLE as error:
        raise ConfigError(f"configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror or error}") from error
    if not isinstance(source, DictConfig):
        raise ConfigError(f"configuration {path} must hold sections such as `run:` and `ppo:`, not a list")
    return source


def _parse_override(item: str) -> DictConfig:
    if "=" not in item or not item.partition("=")[0].strip():
        raise ConfigError(f"--override {item}: expected section.key=value, for example ppo.steps=100")
    if any("\ud800" <= letter <= "\udfff" for letter in item):
        raise ConfigError(f"--override {item!a}: the encoding of this locale cannot read it; set PYTHONUTF8=1")
    try:
        _check_yaml(item.partition("=")[2])
        return OmegaConf.from_dotlist([item])
    except UNUSABLE as error:
        raise ConfigError(f"--override {item}: {' '.join(str(error).split())}") from error


def _check_yaml(text: str) -> None:
    """Raise `ValueError` for YAML that means more than it says: aliases, tags, and nesting without end."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases such as *{event.anchor} are not supported; write the value again")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise ValueError(f"tags such as {event.tag} are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")


def _check_leaves(origin: str, content: object) -> None:
    """Raise `ConfigError` for keys and values that no setting can have, before messages and OmegaConf get them."""
    todo, references = [content], 0
    while todo:
        match todo.pop():
            case dict() as section:
                todo += [*section.keys(), *section.values()]
            case list() as values:
                todo += values
            case str() as text if not text.isprintable():
                raise ConfigError(f"{origin}: {ascii(text)[:80]} holds characters that cannot be printed")
            case str() as text if "${" in text:
                rest, found = REFERENCE.subn("", text)
                references += found
                if "${" in rest or references > MAX_REFERENCES:
                    raise ConfigError(
                        f"{origin}: in {text[:80]} only references such as ${{run.seed}} are possible, "
                        f"{MAX_REFERENCES} in all"
                    )
            case int() as number if abs(number) >= 1 << 63:
                raise ConfigError(f"{origin}: a number has more than 63 bits")


def _check_references(origin: str, merged: dict[object, Any]) -> None:
    """Raise `ConfigError` for a reference to a value that has some itself: a few such lines can stand for gigabytes."""
    values = {key: str(value) for key, value in _leaves(merged)}
    for key, value in values.items():
        for named in REFERENCE.findall(value):
            if "${" in values.get(named, ""):
                raise ConfigError(f"{origin}: {key} refers to {named}, which refers to another key: name that one")


def _check_lengths(path: str | Path, content: object) -> None:
    """Raise `ConfigError` for a text that no file's name or path can have, references put in."""
    match content:
        case dict():
            for value in content.values():
                _check_lengths(path, value)
        case list():
            for value in content:
                _check_lengths(path, value)
        case str() as text if max(map(len, text.encode().split(b"/"))) > MAX_NAME or len(text.encode()) > MAX_TEXT:
            raise ConfigError(f"{path}: {text[:80]}... is too long for the name of a file; shorten it")


def _types() -> dict[str, str]:
    """`{"section.key": declared type}`, the type as written above, for example `int | None`."""
    return {
        f"{name}.{item.name}": str(item.type) for name, section in vars(Config()).items() for item in fields(section)
    }


def _describe(error: Exception) -> str:
    if not isinstance(error, OmegaConfBaseException):
        return f"a value or reference cannot be used ({type(error).__name__})"
    reason = str(error.msg or error).splitlines()[0]
    expected = _types().get(str(error.full_key))
    return f"{error.full_key} must be of type {expected} ({reason})" if expected else reason


def _plain(config: object) -> dict[object, Any]:
    """A configuration of OmegaConf's as dicts, lists and values, references as they are; keys may be of any type."""
    return cast(dict[object, Any], OmegaConf.to_container(config))  # which gives other types for other nodes


def _leaves(node: dict[object, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value; a list is one value."""
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, dotted + ".")
        else:
            yield dotted, value


def flatten(config: Config) -> dict[str, Any]:
    """The configuration as `{"section.key": value}`."""
    return dict(_leaves(_plain(OmegaConf.structured(config))))


def _check_keys(origin: str, source: DictConfig) -> None:
    types = _types()
    sections = [section.name for section in fields(Config)]
    container = _plain(source)
    _check_leaves(origin, container)
    for section, content in container.items():
        if section not in sections:
            nearest = _nearest(str(section), [*sections, *types])
            raise ConfigError(f"{origin}: unknown section `{section}`; did you mean `{nearest}`?")
        if not isinstance(content, dict):
            raise ConfigError(f"{origin}: section `{section}` must hold `key: value` lines, got {content!r}")
        for key, value in content.items():
            dotted = f"{section}.{key}"
            if dotted not in types:
                raise ConfigError(f"{origin}: unknown key `{dotted}`; did you mean `{_nearest(dotted, list(types))}`?")
            # OmegaConf would take any number for a bool, and its mark for "missing" as leave to keep the default.
            if value == "???" or (types[dotted] == "bool" and isinstance(value, int | float) and value not in (0, 1)):
                raise ConfigError(f"{origin}: {dotted} must be of type {types[dotted]}, got {value}")


def _nearest(key: str, valid: Sequence[str]) -> str:
    """The most similar valid key; a bare or misplaced key is also compared by its last part alone."""
    last = key.split(".")[-1]

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        return max(whole, difflib.SequenceMatcher(None, last, candidate.split(".")[-1]).ratio() - 0.05)

    return max(valid, key=similarity)


def check_values(config: Config) -> None:
    """Raise `ConfigError` unless every value is in range and the values fit together."""
    values = flatten(config)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number")
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise ConfigError(f"{key}={values[key]} must be one of: {', '.join(allowed)}")
    for key, limit in AT_LEAST.items():
        if values[key] is not None and values[key] < limit:
            raise ConfigError(f"{key}={values[key]} must be at least {limit}")
    for key in ABOVE_ZERO:
        if values[key] is not None and values[key] <= 0:
            raise ConfigError(f"{key}={values[key]} must be above 0")
    if not config.run.run_name.strip() or Path(config.run.run_name).name != config.run.run_name:
        raise ConfigError(f"run.run_name={config.run.run_name!r} must be a plain folder name")
    _check_mix(config)
    for trained in trained_rewards(config.reward):
        if trained.type in config.evaluation.metrics:
            raise ConfigError(f"evaluation.metrics holds {trained.type}, a trained reward, which is always reported")
    if config.evaluation.on_divergence == "stop" and not (config.evaluation.metrics and config.evaluation.interval):
        raise ConfigError(
            "evaluation.on_divergence=stop needs a held-out metric in evaluation.metrics and evaluations (interval > 0)"
        )
    _check_batch(config.ppo)
    model = config.model
    if model.sigma_min is not None and model.sigma_max is not None and model.sigma_min >= model.sigma_max:
        raise ConfigError(f"model.sigma_min={model.sigma_min} must be below model.sigma_max={model.sigma_max}")
    if config.data.predictor_snapshot is None:
        cold_start_shape(model)


def cold_start_shape(model: ModelConfig) -> tuple[int, int]:
    """`num_steps` and `num_points` of the cold-start table. Raises `ConfigError` where one of them is left open."""
    if model.num_steps is None or model.num_points is None:
        raise ConfigError(
            "model.num_steps and model.num_points are needed to build the start table; "
            "set both, or name a table in data.predictor_snapshot"
        )
    return model.num_steps, model.num_points


def trained_rewards(reward: RewardConfig) -> list[RewardComponent]:
    """What is trained on: the one reward, or the components whose weight is not 0."""
    if reward.type != MIXED:
        return [RewardComponent(reward.type, weights_path=reward.weights_path)]
    return [component for component in reward.components if component.weight]


def _check_mix(config: Config) -> None:
    reward = config.reward
    if (reward.type == MIXED) != bool(reward.components):
        raise ConfigError(
            f"reward.type={reward.type} with {len(reward.components)} reward.components: list components for the type "
            f"{MIXED}, and for no other"
        )
    if reward.type != MIXED:
        return
    if reward.weights_path is not None:
        raise ConfigError(f"reward.weights_path is for one reward; of type {MIXED} each component has its own")
    for index, component in enumerate(reward.components):
        key = f"reward.components[{index}]"
        if not math.isfinite(component.weight):
            raise ConfigError(f"{key}.weight={component.weight} must be a finite number")
        division = DIVISION.fullmatch(component.transform)
        if component.transform not in TRANSFORMS and not (division and float(division[1])):
            raise ConfigError(
                f"{key}.transform={component.transform} must be one of: {', '.join(TRANSFORMS)}, or / and a number"
            )
        if component.transform == "published" and component.type not in PUBLISHED_TRANSFORMS:
            raise ConfigError(
                f"{key}.transform=published is for {', '.join(PUBLISHED_TRANSFORMS)} only, not {component.type}"
            )
        if component.transform == "zscore" and config.trainer.algorithm == "pathwise":
            raise ConfigError(
                f"{key}.transform=zscore needs the scores before their gradients, which trainer.algorithm=pathwise "
                "does not have; use another transform, for example /26"
            )
    trained = [component.type for component in trained_rewards(reward)]
    if not trained:
        raise ConfigError("reward.components: every weight is 0; give one of them another")
    if repeated := {name for name in trained if trained.count(name) > 1}:
        raise ConfigError(f"reward.components holds {', '.join(sorted(repeated))} more than once")


def _check_batch(ppo: PPOConfig) -> None:
    batch = ppo.rollout_batch_size
    if batch % ppo.rloo_k:
        below = batch - batch % ppo.rloo_k
        nearest = f"{below} or {below + ppo.rloo_k}" if below else f"{ppo.rloo_k}"
        raise ConfigError(f"ppo.rollout_batch_size={batch} is not a multiple of ppo.rloo_k={ppo.rloo_k}; use {nearest}")
    if ppo.minibatch_size is not None and batch % ppo.minibatch_size:
        raise ConfigError(
            f"ppo.rollout_batch_size={batch} is not a multiple of ppo.minibatch_size={ppo.minibatch_size}; "
            "minibatches must be of equal size (null takes the whole batch)"
        )


def check_world_size(config: Config, world_size: int) -> None:
    """Raise `ConfigError` unless the samples of a step can be shared out evenly over the processes."""
    if config.ppo.rollout_batch_size % world_size:
        raise ConfigError(
            f"ppo.rollout_batch_size={config.ppo.rollout_batch_size} is not a multiple of the {world_size} processes; "
            "change it or the number of processes"
        )


def check_names(config: Config) -> None:
    """Raise `ConfigError` for a backbone, kind of guidance or reward that the project does not have."""
    for key, value, known in (
        ("model.dataset_name", config.model.dataset_name, BACKBONE_NAMES),
        ("model.guidance_type", config.model.guidance_type, GUIDANCE_TYPES),
    ):
        if value not in known:
            raise ConfigError(f"{key}={value} is unknown; use one of {', '.join(known)}")
    named = [("evaluation.metrics", name) for name in config.evaluation.metrics]
    if config.reward.type == MIXED:
        places = enumerate(config.reward.components)
        named += [(f"reward.components[{index}].type", component.type) for index, component in places]
    else:
        named.append(("reward.type", config.reward.type))
    for key, value in named:
        if value not in REWARD_NAMES and not CUSTOM_REWARD.fullmatch(value):
            others = f"{MIXED}, or package.module:function" if key == "reward.type" else "or package.module:function"
            raise ConfigError(f"{key}={value} is unknown; use one of {', '.join(REWARD_NAMES)}, {others}")
    trained = [component.type for component in trained_rewards(config.reward)]
    if config.reward.enable_amp and not set(trained) & set(PUBLISHED_REWARDS):
        raise ConfigError(
            f"reward.enable_amp is for {', '.join(PUBLISHED_REWARDS)} only; {', '.join(trained)} is computed in float32"
        )


def check_packages(config: Config) -> None:
    """Raise `ConfigError` for an optional package that the configuration asks for and that is not installed."""
    if config.logging.wandb:
        try:
            importlib.metadata.version("wandb")
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(
                "logging.wandb=true needs the package wandb: pip install '.[wandb]', or set it to false"
            ) from error


def check_files(config: Config) -> None:
    """Raise `ConfigError` for a named file that is not there. What they hold is checked where they are read."""
    named = {
        "data.predictor_snapshot": (
            config.data.predictor_snapshot,
            "make a start table with fake_train.py, or use null",
        ),
        "data.prompt_csv": (config.data.prompt_csv, "name a .txt file with one prompt per line, or a .csv file"),
        "evaluation.prompt_file": (config.evaluation.prompt_file, "name another file, or use null"),
    }
    for key, (path, advice) in named.items():
        if path is not None and not shipped_file(Path(path)).is_file():
            raise ConfigError(f"{key}={path} does not exist; {advice}")


def to_yaml(config: Config) -> str:
    """The configuration with every key, as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(first: Config, second: Config) -> list[str]:
    """The dotted keys whose values differ, in the order of the file."""
    other = flatten(second)
    return [key for key, value in flatten(first).items() if value != other[key]]
