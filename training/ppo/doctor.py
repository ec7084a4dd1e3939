"""Say whether training can start here, before a run of days: `python -m training.ppo.doctor`.

To begin, nothing but click is needed: a package that is missing or broken is a line of the report like any other.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_utils.errors import UserError, user_errors
from torch_utils.options import CACHE_VARIABLE, cache_dir_option, command

if TYPE_CHECKING:
    from torch_utils.download_util import Asset, KnownFile
    from training.ppo.config import Config, ModelConfig
    from training.table import SolverTable

PROJECT = Path(__file__).resolve().parents[2]
PRESET = Path(__file__).resolve().parent / "cfgs" / "embedded.yaml"
DISTRIBUTION = "epd-rdpo"  # the name in pyproject.toml, by which an installed copy is found
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+?)\s*(?P<range>(?:(?:>=|<)[\d.]+,?)*)")

OK, NOTE, MISSING, BAD = "ok", "note", "missing", "bad"
INDENT = 34  # of the third column
FEW_BYTES = 2**30  # free space below which a note says so; a run writes tables, logs and some pictures

ENVIRONMENT_WAYS = ("bash train.sh makes .venv with the versions of requirements.txt; start with .venv/bin/python",)
FROM_REPOSITORY = "git checkout -- src brings back what comes with the repository"
BY_HAND_ONLY = ("mps",)  # shared on a drive, which no command can fetch from


@dataclass(frozen=True)
class Finding:
    """One line of the report, and what mends it, one of: commands, overrides or files."""

    status: str  # OK, NOTE, MISSING or BAD
    what: str
    says: str
    ways: tuple[str, ...] = ()


@dataclass
class Checkup:
    """The checks in their order, and what the earlier ones found out for the later ones."""

    config_path: Path
    overrides: tuple[str, ...]
    device: str
    processes: int | None
    hashes: bool
    config: Config | None = None
    start: SolverTable | None = None
    gpus: int = 0
    to_fetch: dict[Path, int] = field(default_factory=dict)  # folder -> bytes that would have to be fetched into it

    def run(self) -> int:
        """Print the report as it is found; returns the number of lines that say missing or bad."""
        faults = 0
        for title, checks in self.groups():
            click.echo(title)
            for finding in checks:
                faults += finding.status in (MISSING, BAD)
                show(finding)
        return faults

    def groups(self) -> Iterator[tuple[str, Iterable[Finding]]]:
        yield "environment", self.environment()
        yield "devices", self.devices()
        yield "configuration", self.configuration()
        yield "weights", self.weights()
        yield "folders", self.folders()

    def environment(self) -> Iterator[Finding]:
        yield from examine("packages", check_packages, ENVIRONMENT_WAYS)
        yield from examine("torch, torchvision", check_torchvision, ENVIRONMENT_WAYS)

    def devices(self) -> Iterator[Finding]:
        yield from examine("GPUs", self.count_gpus, ENVIRONMENT_WAYS)
        for index in range(self.gpus):
            ways = ("CUDA_VISIBLE_DEVICES chooses other GPUs; --device cpu does without",)
            yield from examine(f"GPU {index}", partial(check_gpu, index), ways)

    def count_gpus(self) -> Iterator[Finding]:
        import torch

        if self.device == "cpu":
            yield Finding(NOTE, "GPUs", "none used: --device cpu")
            return
        with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old, and sees none
            warnings.simplefilter("always")
            self.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.gpus:
            driver = nvidia_smi("driver_version") or ["of unknown version"]
            yield Finding(OK, "GPUs", f"{self.gpus}; driver {driver[0]}, torch made for CUDA {torch.version.cuda}")
            return
        reason = "".join(f"; {one_line(warning.message)}" for warning in caught)
        installed = [] if "CUDA_VISIBLE_DEVICES" in os.environ else nvidia_smi("name")
        if self.device == "cuda" or installed:
            there = f", though this machine has {', '.join(installed)}" if installed else ""
            ways = ("update the driver, or install a torch made for it", "--device cpu trains on the CPU")
            yield Finding(BAD, "GPUs", f"none that torch can use{there}{reason}", ways)
        else:
            yield Finding(NOTE, "GPUs", f"none: trains on the CPU{reason}")

    def configuration(self) -> Iterator[Finding]:
        path = short(self.config_path)
        ways = (f"correct {path}, or add --override KEY=VALUE; all keys are in training/ppo/config.py",)
        yield from examine("configuration", self.read_config, ways)
        config = self.config
        if config is None:
            for what in ("names", "named files", "start table", "prompts", "processes"):
                yield Finding(NOTE, what, "not checked: there is no configuration")
            return
        yield from examine("names", partial(self.check_names, config), ways)
        yield from examine("named files", partial(self.check_files, config), ways)
        yield from examine("start table", partial(self.check_start_table, config), self.start_table_ways(config))
        ways = ("--override data.prompt_csv=FILE, or evaluation.prompt_file=FILE",)
        yield from examine("prompts", partial(self.check_prompts, config), ways)
        yield from examine("processes", partial(self.check_processes, config))

    def read_config(self) -> Iterator[Finding]:
        from training.ppo.config import load_config

        config = self.config = load_config(self.config_path, self.overrides)
        trains = f"{config.trainer.algorithm}, {config.ppo.steps} steps"
        yield Finding(OK, "configuration", f"{short(self.config_path)}: {trains}")

    def check_names(self, config: Config) -> Iterator[Finding]:
        from training.denoisers import check_model_schedule
        from training.ppo.config import check_names, check_packages

        check_names(config)
        check_packages(config)
        check_model_schedule(config.model.dataset_name, config.model.schedule_type)
        yield Finding(OK, "names", f"model {config.model.dataset_name}, reward {config.reward.type}")

    def check_files(self, config: Config) -> Iterator[Finding]:
        from training.ppo.config import check_files

        check_files(config)
        yield Finding(OK, "named files", "all there")

    def check_start_table(self, config: Config) -> Iterator[Finding]:
        from training.ppo.inputs import start_table

        start = self.start = start_table(config)
        source = config.data.predictor_snapshot or "the cold start"
        shape = f"{start.num_steps - 1} intervals of {start.num_points} points"
        yield Finding(OK, "start table", f"{source}, {shape}")
        if config.data.predictor_snapshot is None:
            advice = f"a distilled table is better: {self.distill_command()}"
            yield Finding(NOTE, "start table", advice)

    def distill_command(self) -> str:
        return f"python -m training.distill --config {shlex.quote(short(self.config_path))}"

    def start_table_ways(self, config: Config) -> tuple[str, ...]:
        """What makes another start table; the cold start needs its size in the configuration."""
        model, snapshot = config.model, config.data.predictor_snapshot
        if snapshot is None:
            return ("--override model.num_steps=N --override model.num_points=K give the cold start another size",)
        if model.num_steps is None or model.num_points is None:
            return ("--override data.predictor_snapshot=FILE names another table",)
        cold = "--override data.predictor_snapshot=null"
        output = f"{cold} --output {shlex.quote(snapshot)}"
        return (f"{self.distill_command()} {output}", f"{cold} begins from the cold start")

    def check_prompts(self, config: Config) -> Iterator[Finding]:
        from torch_utils.download_util import ASSETS, stored_folder
        from training.ppo.inputs import split_prompts
        from training.prompts import load_prompts

        if config.data.prompt_csv is None:
            asset = ASSETS["prompts"]
            folder = stored_folder(asset)
            if folder is None:
                own = "--override data.prompt_csv=FILE takes prompts of your own"
                yield self.missing("prompts", asset, (fetch_command(asset.key), own))
                if config.evaluation.interval and config.evaluation.prompt_file is not None:
                    load_prompts(config.evaluation.prompt_file)
                return
            config = replace(config, data=replace(config.data, prompt_csv=str(folder / asset.files[0].name)))
        training, held_out = split_prompts(config)
        yield Finding(OK, "prompts", f"{len(training)} to train on, {len(held_out)} held out")

    def check_processes(self, config: Config) -> Iterator[Finding]:
        """A number of processes that was asked for must do; of the GPUs found, fewer can be used."""
        from training.ppo.config import ConfigError, check_world_size

        ppo, count = config.ppo, self.processes or max(self.gpus, 1)
        batch = ppo.rollout_batch_size
        try:
            check_world_size(config, count)
        except ConfigError as error:
            step = math.lcm(count, ppo.rloo_k, ppo.minibatch_size or 1)
            fewer = max(number for number in range(1, count) if batch % number == 0)
            ways = (
                f"--override ppo.rollout_batch_size={math.ceil(batch / step) * step}",
                f"{fewer} of {count} processes: torchrun --nproc_per_node={fewer}",
            )
            yield Finding(BAD if self.processes else NOTE, "processes", one_line(error), ways)
            return
        yield Finding(OK, "processes", f"{count}, each with {batch // count} of the {batch} images of a step")

    def weights(self) -> Iterator[Finding]:
        if self.config is None:
            yield Finding(NOTE, "weights", "not checked: there is no configuration")
            return
        from training.ppo.config import trained_rewards

        own_model = self.config.model.model_path is not None
        way = "--override model.model_path=PATH names another model" if own_model else FROM_REPOSITORY
        yield from examine("model", partial(self.check_backbone, self.config.model), (way,))
        rewards = [("reward", part.type, part.weights_path) for part in trained_rewards(self.config.reward)]
        rewards += [("metric", name, None) for name in self.config.evaluation.metrics]
        for role, name, path in rewards:
            check = partial(self.check_reward, role, name, path)
            ways: tuple[str, ...] = (FROM_REPOSITORY,) if name.startswith("emoji_") else ()
            if path is not None:
                ways = ("give the right weights_path, or null for those of its usual place",)
            yield from examine(f"{role} {name}", check, ways)

    def check_backbone(self, model: ModelConfig) -> Iterator[Finding]:
        """`check_model` is given a path, with which it hashes nothing."""
        from torch_utils.download_util import ASSETS, find_asset, stored_folder
        from training.denoisers import BACKBONES, check_model, model_weights, note_resolution

        if model.dataset_name not in BACKBONES:
            yield Finding(NOTE, "model", f"not checked: there is none called {model.dataset_name}")
            return
        weights, asset = model_weights(model.dataset_name, model.model_path), None
        if isinstance(weights, str):
            asset = find_asset(weights)
            source = stored_folder(asset)
            if source is None:
                own = "--override model.model_path=PATH names a folder, or one .safetensors or .ckpt file"
                yield self.missing("model", asset, (fetch_command(weights), own))
                return
        else:
            source = weights
        check_model(model.dataset_name, model.guidance_type, model.guidance_rate, source, model.precision)
        if asset is not None and asset.key in ASSETS:
            yield from self.verify_asset("model", asset, source, fetch_command(asset.key))
        else:
            yield from self.verify_own("model", source, BACKBONES[model.dataset_name].family.weight_files(source))
        if self.start is not None and (note := note_resolution(model.dataset_name, source, self.start.img_resolution)):
            yield Finding(NOTE, "model", note.removeprefix("note: "))

    def check_reward(self, role: str, name: str, path: str | None) -> Iterator[Finding]:
        """Of one reward: its weights at `path` or in the usual place, and the other file that some need."""
        from torch_utils.download_util import ASSETS, stored_folder
        from training.ppo.reward_models.custom import find_function
        from training.ppo.reward_models.emoji import REWARD_FOLDERS, find_emoji_weights
        from training.ppo.reward_models.imagereward import VOCABULARY_ASSET
        from training.ppo.reward_multi import PUBLISHED
        from training.ppo.reward_weights import find_weights

        what = f"{role} {name}"
        if name in REWARD_FOLDERS:
            folder = find_emoji_weights(name, path)
            yield from self.verify_own(what, folder, [folder / "model.safetensors"])
            return
        if name not in PUBLISHED:
            yield Finding(OK, what, f"code in {find_function(name)[1]}")
            return
        command = f"{cache_prefix()}python -m training.ppo.scripts.score_all --metrics {name} --fetch-only"
        assets = [ASSETS[PUBLISHED[name].key]]
        beside: Path | None = None
        if path is not None and not means_usual_place(assets[0], Path(path)):
            own = find_weights(assets[0].key, path)
            beside = own.parent
            yield from self.verify_own(what, own, [own], assets.pop(0).files[0])
        if (other := PUBLISHED[name].other_key) is not None:
            assets.append(ASSETS[other])
        for asset in assets:
            file = asset.files[0].name
            if asset.key == VOCABULARY_ASSET and beside is not None and (beside / file).is_file():
                yield from self.verify_own(what, beside / file, [beside / file])
                continue
            stored = stored_folder(asset)
            if stored is None:
                yield self.missing(what, asset, () if asset.key in BY_HAND_ONLY else (command,))
            else:
                yield from self.verify_asset(what, asset, stored, command)
            beside = stored

    def missing(self, what: str, asset: Asset, ways: tuple[str, ...]) -> Finding:
        """What would have to be fetched, and how to get it by hand; its size counts for the free space."""
        from torch_utils.download_util import ASSETS, by_hand

        ways = (*ways, f"by hand: {by_hand(asset.key)}")
        if asset.key not in ASSETS:
            return Finding(MISSING, what, f"{asset.key} of the Hugging Face hub, of unknown size", ways)
        target = asset.folders()[-1]
        lacking = [file for file in asset.files if not (target / file.name).is_file()]
        size = sum(file.size or 0 for file in lacking)
        self.to_fetch[target] = self.to_fetch.get(target, 0) + size
        names = lacking[0].name if len(lacking) == 1 else f"{len(lacking)} files"
        return Finding(MISSING, what, f"{names}, {readable(size) if size else 'of unknown size'}", ways)

    def verify_asset(self, what: str, asset: Asset, folder: Path, command: str) -> Iterator[Finding]:
        """Sizes always; hashes where they are remembered, or all of them with --hashes."""
        compared, unread, faults = 0, 0, []
        for file in asset.files:
            path = folder / file.name
            digest = self.digest(path)
            fault = content_fault(path, file, digest)
            if fault is not None:
                faults.append(Finding(BAD, what, fault, (f"rm {shlex.quote(str(path))}, then {command}",)))
            compared += file.sha256 is not None and digest is not None
            unread += file.sha256 is not None and digest is None
        if faults:
            yield from faults
            return
        size = sum((folder / file.name).stat().st_size for file in asset.files)
        place = folder if asset.is_folder else folder / asset.files[0].name
        hashes = [f"SHA-256 as published ({compared} of {compared + unread} files)"] if compared else []
        hashes += ["SHA-256 not compared (--hashes does)"] if unread else []
        said = ", ".join(hashes) or "no hash published"
        yield Finding(OK, what, f"{short(place)}, {readable(size)}, {said}")

    def verify_own(
        self, what: str, place: Path, paths: list[Path], published: KnownFile | None = None
    ) -> Iterator[Finding]:
        """Weights that nobody publishes a hash of, unless `published` is their name: then they must be that file."""
        from torch_utils.download_util import KnownFile
        from training.ppo.reward_weights import ANY_MODEL

        known = published if published and place.name == published.name != ANY_MODEL else None
        said = []
        for path in paths:
            digest = self.digest(path)
            if fault := content_fault(path, known or KnownFile(path.name), digest):
                raise UserError(fault)
            if digest is not None:
                said.append(f"{path.name} has SHA-256 {digest[:12]}...{' as published' if known else ''}")
        size = readable(sum(path.stat().st_size for path in paths))
        yield Finding(OK, what, ", ".join([short(place), size, *said]))

    def digest(self, path: Path) -> str | None:
        from torch_utils.checkpoint import sha256_file
        from torch_utils.download_util import remembered_sha256

        return sha256_file(path) if self.hashes else remembered_sha256(path)

    def folders(self) -> Iterator[Finding]:
        if self.config is None:
            yield Finding(NOTE, "run folders", "not checked: there is no configuration")
        else:
            root = Path(self.config.run.output_root)
            ways = ("--override run.output_root=FOLDER names another place",)
            yield from examine("run folders", partial(check_output_root, root), ways)
        yield from examine("cache", self.check_cache)

    def check_cache(self) -> Iterator[Finding]:
        from dnnlib.util import cache_dir

        ways = (f"--cache-dir DIR or {CACHE_VARIABLE} names another folder",)
        cache = cache_dir()
        others = [folder for folder in self.to_fetch if not folder.is_relative_to(cache)]
        for folder in (cache, *others):
            size = sum(bytes_ for target, bytes_ in self.to_fetch.items() if target.is_relative_to(folder))
            place = nearest_existing(folder)
            free = shutil.disk_usage(place).free
            says = f"{folder}: {readable(free)} free{f', at least {readable(size)} to fetch' if size else ''}"
            if size and not place.is_dir():
                yield Finding(BAD, "cache", f"{folder} cannot be made: {place} is a file", ways)
            else:
                yield Finding(OK if free >= size else BAD, "cache", says, () if free >= size else ways)


def examine(what: str, check: Callable[[], Iterable[Finding]], ways: tuple[str, ...] = ()) -> list[Finding]:
    """What `check` finds, notes that it prints included; whatever it raises is a finding, so that the others still run.

    `ways` mend what is raised.
    """
    found, heard = [], io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            for finding in check():
                found.append(finding)
    except UserError as error:
        found.append(Finding(BAD, what, one_line(error), ways))
    except (Exception, SystemExit) as error:
        # Broken packages raise anything, and so does a reward of the user's own.
        found.append(Finding(BAD, what, f"{type(error).__name__}: {one_line(error)}", ways))
    for line in heard.getvalue().splitlines():
        if line.startswith("note: "):
            found.append(Finding(NOTE, what, line.removeprefix("note: ")))
        else:
            click.echo(line, err=True)
    return found


def show(finding: Finding) -> None:
    click.echo(f"  {finding.status:<8} {finding.what:<{INDENT - 12}} {finding.says}")
    for index, way in enumerate(finding.ways):
        click.echo(f"{'':{INDENT}}{'or ' if index else ''}{way}")


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def readable(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"


def short(path: Path) -> str:
    """As seen from the folder that the command was started in, where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def check_packages() -> Iterator[Finding]:
    """Versions of Python and of every package against the ranges of pyproject.toml."""
    python, packages = requirements()
    yield version_finding("Python", platform.python_version(), python)
    for requirement in packages:
        named = REQUIREMENT.fullmatch(requirement)
        if named is None:
            raise UserError(f"the requirement {requirement!r} cannot be read: only >= and < are known here")
        try:
            version = importlib.metadata.version(named["name"])
        except importlib.metadata.PackageNotFoundError:
            yield Finding(MISSING, named["name"], f"{named['range'] or 'any version'} needed", ENVIRONMENT_WAYS)
        else:
            yield version_finding(named["name"], version, named["range"])


def requirements() -> tuple[str, list[str]]:
    """The range of Python and the requirements: of pyproject.toml in the checkout, else of the installed package."""
    path = PROJECT / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    asked = importlib.metadata.requires(DISTRIBUTION) or []
    python = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    return python, [requirement for requirement in asked if "extra ==" not in requirement]


def version_finding(name: str, version: str, wanted: str) -> Finding:
    if fits(version, wanted):
        return Finding(OK, name, f"{version} ({wanted})")
    return Finding(BAD, name, f"{version}, but {wanted} needed", ENVIRONMENT_WAYS)


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=3.11,<3.14"; a pre-release counts as its release."""
    actual = release(version)
    bounds = re.findall(r"(>=|<)([\d.]+)", wanted)
    return all(actual >= release(bound) if sign == ">=" else actual < release(bound) for sign, bound in bounds)


def release(version: str) -> tuple[int, ...]:
    """The numbers before any suffix, without zeros at the end: 2.10.0+cu130 is (2, 10)."""
    numbers = [int(part) for part in re.findall(r"\d+(?:\.\d+)*", version)[0].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def check_torchvision() -> Iterator[Finding]:
    """torchvision fails to load beside a build of torch that it was not made for."""
    import torch
    import torchvision

    yield Finding(OK, "torch, torchvision", f"fit together: {torch.__version__} and {torchvision.__version__}")


def nvidia_smi(column: str) -> list[str]:
    """One column of what nvidia-smi says, a value for each GPU; empty where there is no such program or no driver."""
    command = ["nvidia-smi", f"--query-gpu={column}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def check_gpu(index: int) -> Iterator[Finding]:
    """Work out something there: a build of torch may lack the code for a GPU that it lists."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    if torch.ones(2, device=f"cuda:{index}").mul(2).sum().item() != 4:
        raise UserError(f"{properties.name} gets 1 + 1 wrong")
    free, total = torch.cuda.mem_get_info(index)
    memory = f"{properties.name}, {readable(free)} of {readable(total)} free"
    if free < total / 2:
        yield Finding(NOTE, f"GPU {index}", f"{memory}: somebody else uses it")
    else:
        yield Finding(OK, f"GPU {index}", memory)


def means_usual_place(asset: Asset, path: Path) -> bool:
    """Whether `find_weights` would look for, and fetch, the published file though a path was given."""
    from training.ppo.reward_weights import ANY_MODEL

    name = asset.files[0].name
    path = path / name if path.is_dir() else path
    return path.name == name != ANY_MODEL and not path.is_file()


def content_fault(path: Path, known: KnownFile, digest: str | None) -> str | None:
    """What is wrong with a file of weights, by its size, its hash where there is one, and its header; or None."""
    size = path.stat().st_size
    if size == 0:
        return f"{path} is empty"
    if known.size is not None and size != known.size:
        return f"{path} has {size} bytes, expected {known.size}"
    if known.sha256 is not None and digest not in (None, known.sha256):
        return f"{path} has SHA-256 {digest}, expected {known.sha256}"
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{path} cannot be read as safetensors: {one_line(error)}"


def cache_prefix() -> str:
    """The cache of this command, for commands that fill it."""
    folder = os.environ.get(CACHE_VARIABLE)
    return f"{CACHE_VARIABLE}={shlex.quote(folder)} " if folder else ""


def fetch_command(key: str) -> str:
    return f"{cache_prefix()}python -m torch_utils.download_util {shlex.quote(key)}"


def nearest_existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_output_root(root: Path) -> Iterator[Finding]:
    """Write, rename and lock in a temporary folder of `root`, or of its nearest parent, which is removed again."""
    from torch_utils.checkpoint import atomic_write_text, lock_folder

    place = nearest_existing(root)
    if not place.is_dir():
        raise UserError(f"run.output_root={root} cannot be made: {place} is a file")
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder, contextlib.ExitStack() as locks:
            atomic_write_text(Path(folder) / "file", "written")
            # The second lock stands for another process: the system tells open files apart, not processes.
            if not lock_folder(folder, locks) or lock_folder(folder, locks):
                raise UserError(f"locks keep nobody out in {place} (run.output_root={root}): it needs working ones")
    except OSError as error:
        raise UserError(f"cannot write in {place} (run.output_root={root}): {error.strerror}") from error
    yield Finding(OK, "run folders", f"{short(root)}: can be written and locked")
    free = shutil.disk_usage(place).free
    says = f"{readable(free)} free"
    yield Finding(NOTE if free < FEW_BYTES else OK, "disk", f"{says}: little" if free < FEW_BYTES else says)


@command(
    {"Run": ("config_path", "overrides", "processes", "hashes"), "Machine": ("device", "cache_dir")},
    exit_codes="Exit codes: 0 training can start; 1 something is missing or bad; 2 wrong options; 130 Ctrl-C.",
)
@click.option(
    "--config",
    "config_path",
    help="YAML file of the run, or a preset: embedded, sd15_single, sd15_parallel",
    metavar="FILE",
    type=Path,
    default=PRESET,
    show_default="the preset embedded.yaml",
)
@click.option(
    "--override", "overrides", help="Change one key, e.g. ppo.steps=100; repeatable", metavar="KEY=VALUE", multiple=True
)
@click.option("--device", help="Where the models will run", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--processes",
    help="Processes of the whole run, of all its nodes together",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="one for each GPU here",
)
@click.option("--hashes", help="Read all weights to compare their SHA-256: gigabytes", is_flag=True)
@cache_dir_option
@user_errors
def main(config_path: Path, overrides: tuple[str, ...], device: str, processes: int | None, hashes: bool) -> None:
    """Say whether training can start here: packages, GPUs, configuration, weights, folders, with what mends each fault.

    \b
    The options are those of training.ppo.launch. The report goes to stdout, a line for each thing:
    ok       as it should be
    note     worth knowing
    missing  to be fetched or installed; the lines below it say how
    bad      to be mended; the lines below it say how

    Nothing is fetched, and nothing is left behind. Hashes of weights are those remembered from earlier runs, unless
    --hashes has them computed. Example (installed: epd-doctor):

    \b
    python -m training.ppo.doctor --config sd15_single --device cuda
    """
    # Should one of the project's functions try to fetch something after all, it is refused.
    os.environ["HF_HUB_OFFLINE"] = "1"
    faults = Checkup(config_path, overrides, device, processes, hashes).run()
    if faults:
        click.echo(f"training cannot start: {faults} to mend, marked missing or bad")
        sys.exit(1)
    words = ["--config", short(config_path), *([] if device == "auto" else ["--device", device])]
    for override in overrides:
        words += ["--override", override]
    click.echo(f"training can start: {cache_prefix()}python -m training.ppo.launch {shlex.join(words)}")


if __name__ == "__main__":
    main()
