"""Locales, paths, rights and clocks that are not the usual ones: the same commands, the same results."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from run_folders import assert_same_end, lines, only_run, without_timings
from toy_training import ToyDenoiser, ToyReward, run_toy, toy_models, write_files

from torch_utils.errors import UserError
from training.images import load_image
from training.manifest import image_name
from training.ppo.export_epd_predictor import find_checkpoint
from training.ppo.launch import Models
from training.ppo.reward_mix import RewardMix
from training.ppo.run_dir import RunDirectory
from training.sampling_options import read_prompts
from training.table import load_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STRANGE = "mein projekt ü 日本"
PROMPTS = ["ein Bär", "猫 🐈", "a red apple", "l’été"]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "exps", "results", "samples", "weights", "docs", "tests")
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}

# small_pipeline.py OUTPUT CHECKOUT: training, export, samples by both commands, scores and their comparison.
PIPELINE = """
import locale, sys
from pathlib import Path

import sample, sample_baseline
from training.ppo import export_epd_predictor, launch
from training.ppo.scripts import compare, score_emoji

out, checkout = Path(sys.argv[1]), Path(sys.argv[2])
print(locale.getpreferredencoding(False), sys.getfilesystemencoding(), file=sys.stderr)


def call(command, *arguments):
    command.main([str(argument) for argument in arguments], standalone_mode=False)


call(launch, "--config", out / "small.yaml", "--device", "cpu")
(run,) = (out / "exps").iterdir()
call(export_epd_predictor, run)
(table,) = (run / "export").glob("*.safetensors")
options = ["--prompt-file", out / "prompts.txt", "--seeds", "0-1", "--device", "cpu", "--grid"]
call(sample, "--predictor_path", table, *options, "--outdir", out / "learned")
ddim = ["--sampler", "ddim", "--dataset-name", "emoji", "--num-steps", 3]
call(sample_baseline, *ddim, *options, "--outdir", out / "ddim")
for name in ("learned", "ddim"):
    call(score_emoji, "--images", out / name, "--output-json", out / f"{name}.json", "--device", "cpu")
call(compare, out / "learned.json", out / "ddim.json", "--output-md", out / "comparison.md")
"""

CONFIG = """
run: {output_root: exps, run_name: small}
data: {prompt_csv: prompts.txt}
model: {dataset_name: emoji, schedule_type: logsnr, num_steps: 2, num_points: 2}
reward: {type: emoji_reward}
ppo: {steps: 2, rollout_batch_size: 2, rloo_k: 2}
evaluation: {interval: 2, prompt_file: prompts.txt, num_prompts: 1, grid_images: 1, metrics: [emoji_heldout]}
logging: {save_interval: 1}
"""

# Root may write everywhere; without this right (CAP_DAC_OVERRIDE, from PR_CAPBSET_DROP) it is as anybody else.
WITHOUT_PRIVILEGE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def copy_checkout(folder: Path) -> Path:
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@dataclass
class Surroundings:
    """Where and how a program runs."""

    folder: Path  # of its output
    checkout: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    privileged: bool = True

    def run(self, *command: object) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if not re.match("LC_|LANG|EPD_|XDG_", name)}
        path = {"PYTHONPATH": str(self.checkout), "LC_ALL": "C.UTF-8"}
        wrapper = [] if self.privileged or os.geteuid() else [sys.executable, "-c", WITHOUT_PRIVILEGE]
        return subprocess.run(
            [*wrapper, *(str(part) for part in command)],
            cwd=self.folder,
            env=inherited | path | self.environment,
            umask=self.umask,
            capture_output=True,
            timeout=280,
        )


@dataclass
class Results:
    """What a small pipeline made."""

    folder: Path
    messages: str

    @property
    def run(self) -> RunDirectory:
        return only_run(self.folder)

    def numbers(self) -> dict[str, object]:
        """All that has to be the same everywhere."""
        (table,) = (self.run.path / "export").glob("*.safetensors")
        pictures = [self.folder / name / image_name(seed) for name in ("learned", "ddim") for seed in (0, 1)]
        scores = [json.loads((self.folder / f"{name}.json").read_text())["scores"] for name in ("learned", "ddim")]
        manifest = (self.folder / "learned" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        return {
            "table": load_table(table).sha256(),
            "pictures": [picture.read_bytes() for picture in pictures],
            "scores": [[(row["prompt"], row["score"]) for row in rows] for rows in scores],
            "prompts": [json.loads(line)["prompt"] for line in manifest],
            "metrics": without_timings(self.run.metrics),
            "evaluations": without_timings(self.run.evaluations),
        }


def small_pipeline(surroundings: Surroundings) -> Results:
    folder = surroundings.folder
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    (folder / "small.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "small_pipeline.py").write_text(PIPELINE, encoding="utf-8")
    done = surroundings.run(sys.executable, "small_pipeline.py", folder, surroundings.checkout)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert "Traceback" not in done.stderr.decode(errors="replace")
    assert "emoji_reward" in done.stdout.decode("utf-8")
    return Results(folder, done.stderr.decode(errors="replace"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Results:
    return small_pipeline(Surroundings(tmp_path_factory.mktemp("usual")))


@pytest.mark.reliability
def test_files_are_for_all_to_read_under_the_usual_umask(usual):
    assert usual.numbers()["prompts"] == PROMPTS[:2]
    assert usual.messages.startswith("UTF-8 utf-8")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in usual.folder.rglob("*")}
    made = {path: mode for path, mode in modes.items() if path.parent != usual.folder or path.is_dir()}
    assert {mode for path, mode in made.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in made.items() if path.is_file()} == {0o644}


@pytest.mark.reliability
def test_umask_077(usual, tmp_path):
    folder = tmp_path / "private"
    folder.mkdir()
    results = small_pipeline(Surroundings(folder, umask=0o077))
    assert results.numbers() == usual.numbers()
    given = {folder / name for name in ("prompts.txt", "small.yaml", "small_pipeline.py")}
    for path in set(folder.rglob("*")) - given:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.reliability
def test_a_locale_that_knows_ascii_only(usual, tmp_path):
    """Prompts from files are UTF-8 in every locale; so is one from the command line. What cannot be, is said."""
    here = Surroundings(tmp_path, environment=C_LOCALE)
    results = small_pipeline(here)
    assert results.messages.splitlines()[0].lower() in ("ansi_x3.4-1968 ascii", "us-ascii ascii")
    assert results.numbers() == usual.numbers()
    assert "±" in (tmp_path / "comparison.md").read_text(encoding="utf-8")

    sample = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--predictor_path"]
    (table,) = (results.run.path / "export").glob("*.safetensors")
    done = here.run(*sample, table, "--prompt", PROMPTS[0], "--seeds", "0", "--outdir", f"aus gäbe {STRANGE}")
    assert done.returncode == 0, done.stderr
    one, other = (
        load_image(folder / image_name(0)) for folder in (tmp_path / f"aus gäbe {STRANGE}", tmp_path / "learned")
    )
    assert ((one - other) * 255).abs().max() <= 1  # the batches are of another size


def test_a_prompt_that_is_not_utf_8_is_one_line():
    """As Python hands over the bytes of ISO 8859-1."""
    assert read_prompts(None, "ein B\udcc3\udca4r", "0") == ([0], [PROMPTS[0]])
    with pytest.raises(UserError, match=r"^--prompt is not valid UTF-8; write it into a file"):
        read_prompts(None, "ein B\udce4r", "0")


# A path or name that only UTF-8 has, where it would have to be written down.
NOT_IN_ASCII = {
    "output_root": (["--override", "run.output_root=gäbe"], "cannot read it; set PYTHONUTF8=1"),
    "run_name": (["--override", "run.run_name='l\\u00e4uf'"], "set PYTHONUTF8=1"),
    "config": (["--config", "gäbe.yaml"], "No such file or directory"),
}


@pytest.mark.reliability
@pytest.mark.parametrize("case", NOT_IN_ASCII)
def test_what_a_locale_cannot_express_is_one_line(tmp_path, case):
    options, words = NOT_IN_ASCII[case]
    options = [option.replace("'l\\u00e4uf'", '"l\\u00e4uf"') for option in options]
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    (tmp_path / "small.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "training.ppo.launch", "--config", "small.yaml", "--device", "cpu", *options]
    done = Surroundings(tmp_path, environment=C_LOCALE).run(*command)
    said = done.stderr.decode("ascii").splitlines()
    assert done.returncode == 2 and said[-1].startswith("Error: ") and words in said[-1], said
    assert len(said) == 1 and not list(tmp_path.glob("exps/*"))


@pytest.mark.reliability
def test_paths_with_spaces_and_unicode(usual, tmp_path):
    folder = tmp_path / f"{STRANGE} 'out'"
    folder.mkdir()
    results = small_pipeline(Surroundings(folder, checkout=copy_checkout(tmp_path / STRANGE)))
    assert results.numbers() == usual.numbers()


@pytest.fixture(scope="module")
def read_only(tmp_path_factory) -> Path:
    """A checkout that nobody may write to."""
    checkout = copy_checkout(tmp_path_factory.mktemp("read") / "checkout")
    for path in (checkout, *checkout.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return checkout


@pytest.fixture
def closed_home(tmp_path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    return home


@pytest.mark.reliability
def test_a_checkout_and_a_home_that_cannot_be_written(usual, read_only, closed_home, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    before = tree(read_only)
    here = Surroundings(folder, checkout=read_only, environment={"HOME": str(closed_home)}, privileged=False)
    assert here.run("touch", read_only / "x").returncode == here.run("touch", closed_home / "x").returncode == 1
    assert small_pipeline(here).numbers() == usual.numbers()
    assert tree(read_only) == before and not list(closed_home.iterdir())


# refused.py FORBIDDEN: every command that writes, told to write into a folder where it may not.
REFUSED = """
import sys
from pathlib import Path

from click.testing import CliRunner

import fake_train, sample, sample_baseline
from torch_utils import distributed
from training import distill
from training.ppo import export_epd_predictor, launch
from training.ppo.scripts import compare, score_all, score_emoji

out, forbidden = Path(sys.argv[1]), Path(sys.argv[2])
(table,) = out.glob("exps/*/export/*.safetensors")
to_forbidden = ["--device", "cpu", "--outdir", forbidden / "new"]
prompt = ["--prompt", "a", "--seeds", "0"]
config = ["--config", out / "small.yaml", "--device", "cpu"]
for command, arguments in [
    (fake_train, ["--num-steps", 3, "--num-points", 2, "--outdir", forbidden / "new"]),
    (distill, [*config, "--output", forbidden / "table.json"]),
    (launch, [*config, "--override", f"run.output_root={forbidden}/new"]),
    (launch, [*config, "--override", f"run.output_root={forbidden}"]),
    (launch, ["--resume", forbidden / "run", "--override", "ppo.steps=3", "--device", "cpu"]),
    (export_epd_predictor, [forbidden / "run"]),
    (sample, ["--predictor_path", table, *prompt, *to_forbidden]),
    (sample_baseline, ["--sampler", "ddim", "--dataset-name", "emoji", *prompt, *to_forbidden]),
    (sample, ["--predictor_path", table, *prompt, "--device", "cpu", "--outdir", forbidden / "empty"]),
    (score_emoji, ["--images", out / "ddim", "--device", "cpu", "--output-json", forbidden / "x.json"]),
    (score_all, ["--images", out / "ddim", "--metrics", "emoji_reward", "--output-json", forbidden / "x.json"]),
    (compare, [out / "ddim.json", "--output-json", forbidden / "x.json"]),
    (compare, [out / "ddim.json", "--output-md", forbidden / "x.md"]),
]:
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    distributed.shutdown()
    print(command.__name__, result.exit_code, "|", repr(result.exception), "|", result.stderr.strip().splitlines()[-1:])
"""


@pytest.mark.reliability
def test_places_that_cannot_be_written_are_named_in_one_line(usual, tmp_path):
    forbidden = tmp_path / "forbidden"
    (forbidden / "empty").mkdir(parents=True)
    shutil.copytree(usual.run.path, forbidden / "run", ignore=shutil.ignore_patterns("export"))
    for path in (forbidden, *forbidden.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = tree(forbidden)
    here = Surroundings(usual.folder, privileged=False)
    done = here.run(sys.executable, "-c", REFUSED, usual.folder, forbidden)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 13, done.stderr.decode()
    for line in lines:
        assert " 2 | SystemExit(2) | ['Error: " in line and str(forbidden) in line, line
        assert "denied" in line or "no folder that files can be made in" in line, line
    assert tree(forbidden) == before


@pytest.mark.reliability
def test_a_cache_that_cannot_be_made_names_the_variable(closed_home, tmp_path):
    config = ROOT / "training" / "ppo" / "cfgs" / "sd15_single.yaml"
    environment = {"HOME": str(closed_home), "HF_HUB_OFFLINE": "0"}
    here = Surroundings(tmp_path, environment=environment, privileged=False)
    done = here.run(sys.executable, "-m", "training.ppo.launch", "--config", config, "--device", "cpu")
    (said,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and said.startswith(f"Error: {closed_home}/.cache/epd/prompts cannot be written: ")
    assert said.endswith("name a cache folder with --cache-dir or in EPD_CACHE")


# --- The shell scripts ----------------------------------------------------------------------------------------------


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text)
        assert count == 1, pattern
    path.write_text(text, encoding="utf-8")


def run_script(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", script, *arguments],
        cwd="/",
        env=environment | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.reliability
@pytest.mark.timeout(900)
def test_the_scripts_in_a_folder_with_spaces_and_unicode(tmp_path):
    """Both as they are, but for fewer images and solvers, called from elsewhere."""
    checkout = copy_checkout(tmp_path / STRANGE)
    edit(
        checkout / "training" / "ppo" / "cfgs" / "embedded.yaml",
        *(("steps: 16", "steps: 1"), ("prompts: 8", "prompts: 1\n  grid_points: 2\n  teacher_steps: 1")),
        *(("rollout_batch_size: 8", "rollout_batch_size: 4"), ("num_prompts: 64", "num_prompts: 1")),
    )
    edit(checkout / "sample.sh", (r'baselines=\("ddim-10 .*', 'baselines=("ddim-2 ddim 3")'))
    trained = run_script(checkout / "train.sh")
    assert trained.returncode == 0, trained.stderr
    sampled = run_script(checkout / "sample.sh", SEEDS="0,1")
    assert sampled.returncode == 0, sampled.stderr
    assert re.search(r"^\| ddim-2 +\| ddim ", sampled.stdout, re.MULTILINE)
    for folder in (checkout / "exps", checkout / "samples", checkout / "results"):
        assert folder.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {STRANGE}


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("wrong", "words"),
    [("  stepps: 40", "unknown key `ppo.stepps`; did you mean `ppo.steps`?"), ("  steps: 0", "ppo.steps=0 ")],
)
def test_a_mistake_is_said_once_before_processes_are_started(tmp_path, wrong, words):
    checkout = copy_checkout(tmp_path / STRANGE)
    edit(checkout / "training" / "ppo" / "cfgs" / "sd15_parallel.yaml", ("  steps: 40", wrong))
    start = checkout / "exps" / "ms_coco-11-20-epd-distilled" / "table.safetensors"
    start.parent.mkdir(parents=True)
    start.write_bytes(b"")
    done = run_script(checkout / "train.sh", "sd15-multi")
    assert done.returncode == 2 and not done.stdout
    printed, said = done.stderr.splitlines()
    assert printed.startswith("+ ") and printed.endswith(f"{start.relative_to(checkout)} --dry-run")
    assert said.startswith("Error: ") and words in said
    done = run_script(checkout / "train.sh", "sd15-multi", "ppo.steps=0")
    assert done.returncode == 2 and "takes one preset and nothing else" in done.stderr
    assert done.stderr.count("\n") == 1


# --- The clock ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunDirectory:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_toy(write_files(root), "never", CLOCK_OPTIONS) == 0
    return newest_run(root)


CLOCK_OPTIONS = ["ppo.steps=6", "logging.tensorboard=true"]


def newest_run(root: Path) -> RunDirectory:
    return RunDirectory(max((root / "exps").iterdir()))


class Clock:
    """The wall clock, which someone sets. Clocks that count from a start of their own go on as before."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.ahead = 0.0
        now, local, formatted = time.time, time.localtime, time.strftime
        patch.setattr(time, "time", lambda: now() + self.ahead)
        patch.setattr(time, "time_ns", lambda: int((now() + self.ahead) * 1e9))
        patch.setattr(time, "localtime", lambda seconds=None: local(time.time() if seconds is None else seconds))
        patch.setattr(time, "strftime", lambda text, of=None: formatted(text, time.localtime() if of is None else of))


class SetsTheClock(ToyReward):
    """The toy reward; in its fifth call the clock is set, and then the process is asked to stop."""

    def __init__(self, clock: Clock, seconds: float, signum: int | None):
        super().__init__()
        self.clock, self.seconds, self.signum, self.calls = clock, seconds, signum, 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls == 5:
            self.clock.ahead += self.seconds
            if self.signum:
                os.kill(os.getpid(), self.signum)
        return super().score(images, prompts)


@pytest.mark.parametrize("signum", [None, signal.SIGTERM])
@pytest.mark.parametrize("hours", [-1, 1, -24 * 365])
def test_a_clock_that_is_set_in_the_middle_of_a_run(undisturbed, tmp_path, monkeypatch, capsys, hours, signum):
    toy, clock = write_files(tmp_path), Clock(monkeypatch)
    models = Models(ToyDenoiser(), RewardMix.of(SetsTheClock(clock, 3600 * hours, signum)), toy_models().metrics)
    assert run_toy(toy, "auto", CLOCK_OPTIONS, models) == (signum or 0)
    if signum:
        assert run_toy(toy, "auto", CLOCK_OPTIONS) == 0
    run = only_run(tmp_path)
    assert_same_end(run, undisturbed, 6)
    records = lines(run.metrics) + lines(run.evaluations)
    taken = [value for record in records for name, value in record.items() if "seconds" in name]
    assert len(taken) > 30 and all(0 <= seconds < 60 for seconds in taken)
    assert not re.search(r"-\d|\d:\d\d:\d\d left", "".join(re.findall(r", [^,]* left$", capsys.readouterr().err, re.M)))


def test_runs_of_one_second_and_of_an_earlier_one_have_names_of_their_own(tmp_path, monkeypatch):
    toy = write_files(tmp_path)
    times = iter(["20300101-000000", "20300101-000000", "20300101-000001", "20291231-230000"])
    monkeypatch.setattr(time, "strftime", lambda text: next(times))
    names = []
    for _ in range(3):
        run_toy(toy, "never", ["ppo.steps=1", "evaluation.interval=0"])
        (new,) = {path.name for path in (tmp_path / "exps").iterdir()} - set(names)
        names.append(new)
    assert names == ["20300101-000000-toy", "20300101-000001-toy", "20291231-230000-toy"]


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path, capsys):
    toy = write_files(tmp_path)
    run_toy(toy, "never", ["ppo.steps=6"])
    run = newest_run(tmp_path)
    for path in run.path.rglob("*"):
        os.utime(path, (2e9, 2e9))
    for step in run.checkpoint_steps():
        os.utime(run.checkpoint(step), (1e9 - step, 1e9 - step))
    assert find_checkpoint(run, Path("checkpoints/policy-step000002.pt")) == run.checkpoint(2)
    run.best_checkpoint.unlink()
    assert find_checkpoint(run, None) == run.checkpoint(6)
    for resume in (str(run.path), "auto"):
        capsys.readouterr()
        run_toy(toy, resume, ["ppo.steps=6"])
        assert "6 of 6 steps done" in capsys.readouterr().err
