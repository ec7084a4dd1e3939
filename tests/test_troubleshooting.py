"""docs/troubleshooting.md: each mistake is made, says what the page says, and is mended by what the page names."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner
from launchers import free_port
from test_docs import fault_of, module_of

from torch_utils.checkpoint import lock_folder
from torch_utils.download_util import ASSETS, stored_folder

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
HEADING = re.compile(r"### (?P<title>.+?)(?: \((?P<mark>exit \d|GPU)\))?\n(?P<text>.+)", re.DOTALL)
# What a checkout has and these commands need. Everything else in the folder is the test's own.
LINKED = [
    *("HPSv2", "MPS", "dnnlib", "src", "torch_utils", "training", "pyproject.toml", "requirements.txt"),
    *("fake_train.py", "sample.py", "sample_baseline.py", "solver_utils.py", "solvers.py", "setup_env.sh", "train.sh"),
]

SMALL = """
run: {run_name: small}
data: {prompt_csv: src/prompts/emoji_train.txt}
model: {dataset_name: emoji, guidance_rate: 1, schedule_type: logsnr, num_steps: 3, num_points: 2}
reward: {type: emoji_reward}
ppo: {steps: 2, rollout_batch_size: 2, rloo_k: 2}
evaluation: {interval: 0}
logging: {save_interval: 1, tensorboard: false}
"""
REWARDS = """
def broken(images, prompts):
    return images.flatten(1).mean(1) + float("nan")

def detached(images, prompts):
    return images.detach().flatten(1).mean(1)

def grainy(images, prompts):
    return images.diff(dim=3).abs().flatten(1).mean(1)
"""
LAUNCH = "python -m training.ppo.launch --config small.yaml"
RUN = "exps/20260101-000000-small"
TABLE = "start/network-snapshot-000000.pkl"
SAMPLE = f"python sample.py --predictor-path {TABLE} --prompt-file prompts.txt --outdir"
BASELINE = (
    "python sample_baseline.py --sampler ddim --dataset-name emoji --num-steps 3 --prompt-file prompts.txt --outdir"
)
START = (
    "python fake_train.py --dataset-name emoji --schedule-type logsnr --guidance-rate 1 --num-steps 3 --num-points 2"
)
EXPORT = f"python -m training.ppo.export_epd_predictor {RUN}"
SCORE = "python -m training.ppo.scripts.score_emoji --images"
SCORE_ALL = "python -m training.ppo.scripts.score_all --metrics emoji_reward --output-json c.json --images"
COMPARE = "python -m training.ppo.scripts.compare a.json b.json"
SET_UP = "source ./setup_env.sh; ensure_python"


@dataclass(frozen=True)
class Entry:
    title: str  # what the program prints, `...` for anything; or a symptom
    is_message: bool
    mark: str | None
    text: str  # on one line

    @property
    def exit_code(self) -> int:
        if self.mark is not None:
            return int(self.mark.removeprefix("exit "))
        return 2 if self.title.startswith("Error: ") else 1


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    output: str


@dataclass(frozen=True)
class Case:
    fix: str  # what the entry says that mends it, word for word
    mended: str | Callable[[], object]  # works once the damage is undone
    wrong: str | Callable[[], object] | None = None  # None: only a GPU would
    damage: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # around `wrong`
    parses: bool = False  # `mended` needs what is not here: it is parsed only


def entries() -> dict[str, Entry]:
    found = {}
    for section in re.split(r"^(?=##)", PAGE, flags=re.MULTILINE):
        if section.startswith("###"):
            match = HEADING.fullmatch(section)
            assert match is not None, section
            title = match["title"].strip("`")
            assert title not in found, title
            is_message = match["title"] == f"`{title}`"
            found[title] = Entry(title, is_message, match["mark"], " ".join(match["text"].split()))
    return found


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, message.split("..."))))


@cache
def texts_of_the_code() -> list[str]:
    """Every text in the project's code, with `...` where a value is put in."""
    texts = []
    for path in [ROOT / "solver_utils.py", *(ROOT / "torch_utils").rglob("*.py"), *(ROOT / "training").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def is_in_the_code(message: str) -> bool:
    wanted = pattern(message.removeprefix("Error: "))
    return any(wanted.match(text) for text in texts_of_the_code())


def run(command: str | Callable[[], object]) -> Outcome:
    """A command in the current folder, in this process where it is `python` alone, or a call from Python."""
    if callable(command):
        try:
            outcome = command()
        except Exception as error:
            return Outcome(1, f"{type(error).__name__}: {error}")
        return outcome if isinstance(outcome, Outcome) else Outcome(0, "")
    if re.match(r"python (-m )?[a-z]", command):
        found = module_of(shlex.split(command))
        assert found is not None
        module, arguments = found
        result = CliRunner().invoke(importlib.import_module(module).main, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, " ".join(result.output.split()))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, " ".join((done.stdout + done.stderr).split()))


def done(command: str) -> None:
    outcome = run(command)
    assert outcome.exit_code == 0, f"{command}: {outcome.output}"


# --- Damages: in the current folder, undone at the end where that is what mends it --------------------------------


@contextlib.contextmanager
def torchvision_for_another_torch() -> Iterator[None]:
    """It finds no compiled part that it can load, as beside a torch that it was not built for."""
    folder = Path("other/torchvision")
    folder.mkdir(parents=True)
    for path in Path(str(importlib.metadata.distribution("torchvision").locate_file("torchvision"))).iterdir():
        if path.suffix != ".so":
            (folder / path.name).symlink_to(path)
    yield


def programs(*names: str) -> Path:
    """A folder with these programs and no others."""
    folder = Path("bin")
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


@contextlib.contextmanager
def old_python() -> Iterator[None]:
    python = programs("bash", "dirname") / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")  # the answer to whether it is new enough
    python.chmod(0o755)
    yield


@contextlib.contextmanager
def requirements_without_effect() -> Iterator[None]:
    (programs("bash", "dirname") / "python3").symlink_to(Path(sys.executable).resolve())
    Path("requirements.txt").unlink()
    Path("requirements.txt").touch()
    yield
    shutil.rmtree(".venv")


def not_on_this_machine(key: str) -> None:
    if stored_folder(ASSETS[key]) is not None:
        pytest.skip(f"{key} is on this machine")


@contextlib.contextmanager
def no_prompts() -> Iterator[None]:
    not_on_this_machine("prompts")
    yield
    (Path("cache/prompts") / ASSETS["prompts"].files[0].name).write_text("text\na red apple\n")


@contextlib.contextmanager
def error_page_as_weights() -> Iterator[None]:
    not_on_this_machine("hps_v2.1")
    path = Path("cache/hps") / ASSETS["hps_v2.1"].files[0].name
    path.parent.mkdir(parents=True)
    path.write_text("<html>")
    yield


@contextlib.contextmanager
def half_a_model() -> Iterator[None]:
    Path("model/unet").mkdir(parents=True)
    yield


@contextlib.contextmanager
def half_a_table() -> Iterator[None]:
    done(EXPORT)
    (exported,) = Path(RUN, "export").glob("*.safetensors")
    Path("table.safetensors").write_bytes(exported.read_bytes()[:200])
    yield


@contextlib.contextmanager
def plug_in_table() -> Iterator[None]:
    done(f"{START} --sampler-stu ipndm --outdir plug-in")
    yield


def locked(folder: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def damage() -> Iterator[None]:
        with contextlib.ExitStack() as locks:
            assert lock_folder(Path(folder), locks)
            yield

    return damage


@contextlib.contextmanager
def half_a_checkpoint() -> Iterator[None]:
    path = Path(RUN, "checkpoints/policy-step000002.pt")
    path.write_bytes(path.read_bytes()[:500])
    yield
    path.rename("moved-away.pt")


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Files of 3,000 bytes at most: logs and tables fit, checkpoints do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def pictures_from_elsewhere() -> Iterator[None]:
    shutil.copytree("samples/000000", "pictures")
    yield


@contextlib.contextmanager
def damaged_picture() -> Iterator[None]:
    Path("samples/000000/000001.png").write_bytes(b"no picture")
    yield


@contextlib.contextmanager
def fewer_samples() -> Iterator[None]:
    done(f"{SAMPLE} fewer --seeds 0")
    yield


@contextlib.contextmanager
def scores_by_other_weights() -> Iterator[None]:
    done(f"{SCORE} samples --output-json a.json")
    record = json.loads(Path("a.json").read_text()) | {"weights_sha256": "0" * 64, "images_dir": "samples/other"}
    Path("b.json").write_text(json.dumps(record))
    yield


@contextlib.contextmanager
def port_in_use() -> Iterator[None]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        with mock.patch.dict(os.environ, PORT=str(listener.getsockname()[1])):
            yield


@contextlib.contextmanager
def one_of_two() -> Iterator[None]:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with mock.patch.dict(os.environ, alone, MASTER_PORT=str(free_port())):
        yield


def with_a_rank_that_hangs() -> Outcome:
    """Two processes train; the second is stopped for good. The first one's outcome."""
    limits = "--override ppo.steps=100000 --override run.timeout_minutes=0.05"
    words = shlex.split(f"{sys.executable} -{LAUNCH.partition('-')[2]} --resume never --device cpu {limits}")
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            words, env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        lines = []
        assert ranks[0].stderr is not None
        for line in ranks[0].stderr:
            lines.append(line)
            if line.startswith("run folder"):
                ranks[1].send_signal(signal.SIGSTOP)
        return Outcome(ranks[0].wait(30), " ".join(" ".join(lines).split()))
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@cache
def pipeline():
    from diffusers import StableDiffusionPipeline

    from training.diffusers_plugin import apply_epd

    return apply_epd(StableDiffusionPipeline.from_pretrained(ROOT / "src/embedded"), TABLE)


def pipe(**arguments: object) -> Callable[[], object]:
    return lambda: pipeline()("a red apple", output_type="latent", **arguments)


CASES = {
    # Installation
    "RuntimeError: operator torchvision::nms does not exist": Case(
        "python -m training.ppo.doctor",
        "python -m training.ppo.doctor --config embedded",
        "PYTHONPATH=other python -m training.ppo.doctor --config embedded",
        torchvision_for_another_torch,
    ),
    "ModuleNotFoundError: No module named ...": Case(
        "Start with `.venv/bin/python -m ...`",
        f"{LAUNCH} --dry-run",
        f"python -S {LAUNCH.removeprefix('python ')} --dry-run",  # without the packages that are installed
    ),
    "Error: python3 must be Python 3.11 to 3.13; install one and put it first in PATH": Case(
        "PATH=/path/to/its/bin:$PATH bash train.sh", SET_UP, "PATH=$PWD/bin bash train.sh", old_python
    ),
    "Error: .venv is incomplete after the installation, for the reason above; delete .venv to begin anew": Case(
        "rm -r .venv", SET_UP, "PATH=$PWD/bin bash train.sh", requirements_without_effect
    ),
    # Files and weights
    "Error: ... needs ...: get it from ... and put it into ... (HF_HUB_OFFLINE forbids downloads)": Case(
        "python -m torch_utils.download_util ms_coco prompts hps_v2.1",
        "python -m torch_utils.download_util ms_coco prompts hps_v2.1",
        "python -m torch_utils.download_util owner/none",
        parses=True,
    ),
    "Error: ... needs ...: get it from ... and put it into ... (cannot fetch ...)": Case(
        "put it into the named folder, under its name",
        "python -m torch_utils.download_util prompts",
        "HF_HUB_OFFLINE=0 https_proxy=http://127.0.0.1:9 python -m torch_utils.download_util prompts",
        no_prompts,
    ),
    "Error: ... has ... bytes, expected ...: delete it and fetch it again": Case(
        "python -m torch_utils.download_util hps_v2.1",
        "python -m torch_utils.download_util hps_v2.1",
        "python -m training.ppo.scripts.score_all --metrics hps --fetch-only",
        error_page_as_weights,
        parses=True,
    ),
    "Error: model folder ... lacks ...": Case(
        "without `--model-path` the usual model is taken",
        f"{BASELINE} other --seeds 0",
        f"{BASELINE} other --seeds 0 --model-path model",
        half_a_model,
    ),
    # Configuration
    "Error: cannot read configuration ...: No such file or directory": Case(
        "python -m training.ppo.launch --config embedded --dry-run",
        "python -m training.ppo.launch --config embedded --dry-run",
        "python -m training.ppo.launch --config embeded --dry-run",
    ),
    "Error: ...: unknown key ...; did you mean ...?": Case(
        "Take the one suggested",
        f"{LAUNCH} --override ppo.steps=3 --dry-run",
        f"{LAUNCH} --override ppo.step=3 --dry-run",
    ),
    "Error: ...: ... must be of type ... (...)": Case(
        "write a whole number for `int`",
        f"{LAUNCH} --override ppo.steps=3 --dry-run",
        f"{LAUNCH} --override ppo.steps=many --dry-run",
    ),
    "ppo.rollout_batch_size=... is not a multiple of the ... processes; change it or the number of ...": Case(
        "computes the nearest batch",
        "python -m training.ppo.doctor --config small.yaml --processes 3 --override ppo.rollout_batch_size=6",
        "python -m training.ppo.doctor --config small.yaml --processes 3",
    ),
    "Error: trainer.algorithm=pathwise needs rewards that can be differentiated, and ... cannot; use rdpo": Case(
        "--override trainer.algorithm=rdpo",
        f"{LAUNCH} --override reward.type=mistaken_rewards:detached --override trainer.algorithm=rdpo",
        f"{LAUNCH} --override reward.type=mistaken_rewards:detached --override trainer.algorithm=pathwise",
    ),
    # Tables
    "Error: ...: unknown table format ...; use .safetensors, .json, .pkl": Case(
        "python -m training.ppo.export_epd_predictor",
        EXPORT,
        f"{SAMPLE.replace(TABLE, f'{RUN}/checkpoints/policy-step000002.pt')} other --seeds 0",
    ),
    "Error: ...: not a valid .safetensors file": Case(
        "python -m training.ppo.export_epd_predictor",
        EXPORT,
        f"{SAMPLE.replace(TABLE, 'table.safetensors')} other --seeds 0",
        half_a_table,
    ),
    "Error: model.num_steps=..., but ... has ...; leave model.num_steps out, or build a table": Case(
        "--override model.num_steps=null",
        f"{LAUNCH} --override data.predictor_snapshot={TABLE} --override model.num_steps=null",
        f"{LAUNCH} --override data.predictor_snapshot={TABLE} --override model.num_steps=6",
    ),
    "Error: ... is a table for the solver ...; PPO trains tables for 'epd'": Case(
        "python fake_train.py",
        f"{START} --outdir other",
        f"{LAUNCH} --override data.predictor_snapshot={TABLE.replace('start', 'plug-in')}",
        plug_in_table,
    ),
    "note: ... was made for guidance_rate=...; this run uses model.guidance_rate=...": Case(
        "whatever is the table's",
        f"{LAUNCH} --override data.predictor_snapshot={TABLE} --override model.guidance_rate=1",
        f"{LAUNCH} --override data.predictor_snapshot={TABLE} --override model.guidance_rate=2",
    ),
    # Sampling
    "Error: seed ... has no prompt: ... prompts serve seeds 0-...": Case(
        "--seeds 0-1", f"{SAMPLE} samples --seeds 0-1", f"{SAMPLE} samples --seeds 0-5"
    ),
    "Error: ... has an image of seed ... made with ..., not ...; choose another --outdir, or --overwrite": Case(
        "--overwrite", f"{BASELINE} samples --seeds 0-1 --overwrite", f"{BASELINE} samples --seeds 0-1"
    ),
    "Error: another process writes to ...; choose another --outdir, or use torchrun": Case(
        "Wait for the first", f"{SAMPLE} samples --seeds 0-1", f"{SAMPLE} samples --seeds 0-1", locked("samples")
    ),
    "Error: GPU ... was asked for, but ... can be seen here: ...": Case(
        "--device cpu",
        f"{SAMPLE} other --seeds 0 --device cpu",
        f"CUDA_VISIBLE_DEVICES= {SAMPLE} other --seeds 0 --device cuda",
    ),
    "Error: the GPU's memory does not suffice for ... images at a time; ...": Case(
        "--max-rows 8", f"{SAMPLE} samples --seeds 0-1 --batch 1 --max-rows 8"
    ),
    # Training
    "run folder ..., 2 of 2 steps done": Case("--resume never", f"{LAUNCH} --resume never", LAUNCH),
    "Error: ... is in use by process ... on ...; wait for it, or use --resume never": Case(
        "The lock ends with its process", f"{LAUNCH} --resume {RUN}", f"{LAUNCH} --resume {RUN}", locked(RUN)
    ),
    "Error: ... was run with other values of ...; use the same, or --resume never": Case(
        "python -m training.ppo.launch --resume",
        f"python -m training.ppo.launch --resume {RUN}",
        f"{LAUNCH} --resume {RUN} --override ppo.learning_rate=0.5",
    ),
    "Error: checkpoint ... is damaged or incomplete: ...; to go on from ..., move the damaged ones away": Case(
        "`mv` it out of the folder", f"{LAUNCH} --resume {RUN}", f"{LAUNCH} --resume {RUN}", half_a_checkpoint
    ),
    "Error: step ...: ... gave nan for the prompt ...; ..., more than ppo.max_dropped_groups=...; ...": Case(
        "--override ppo.max_dropped_groups=100",
        f"{LAUNCH} --override reward.type=mistaken_rewards:broken --override ppo.max_dropped_groups=100",
        f"{LAUNCH} --override reward.type=mistaken_rewards:broken --override ppo.max_dropped_groups=0",
    ),
    "Error: step ...: cannot write ...; make room there and start again, the run goes on from ...": Case(
        "Make room and give the same command", f"{LAUNCH} --resume never", f"{LAUNCH} --resume never", no_room
    ),
    "Error: step ...: the GPU's memory does not suffice; make fewer images at once with ...": Case(
        "--override ppo.rollout_micro_batch=2", f"{LAUNCH} --override ppo.rollout_micro_batch=2"
    ),
    "step ...: ... rose by ... over step ..., but ... fell by ... (...): the policy exploits the reward; ...": Case(
        "--override evaluation.on_divergence=stop",
        "python -m training.ppo.launch --config embedded --override evaluation.on_divergence=stop --dry-run",
        f"{LAUNCH} --override reward.type=mistaken_rewards:grainy --override trainer.algorithm=pathwise "
        "--override pathwise.learning_rate=1 --override ppo.train_scale_dir=true --override ppo.steps=1 "
        "--override evaluation.interval=1 --override evaluation.metrics=[emoji_heldout] "
        "--override evaluation.num_prompts=4 --override evaluation.prompt_file=src/prompts/emoji_eval.txt",
    ),
    # Scoring
    "Error: ... has no manifest.jsonl: say with --prompts which prompt belongs to which image": Case(
        "--prompts", f"{SCORE} pictures --prompts prompts.txt", f"{SCORE} pictures", pictures_from_elsewhere
    ),
    "Error: ... of ... images cannot be read: ...": Case(
        "python sample.py", f"{SAMPLE} samples --seeds 0-1", f"{SCORE} samples", damaged_picture
    ),
    "Error: the folders hold different images (by seed and prompt); ...; --allow-missing compares ...": Case(
        "--allow-missing", f"{SCORE_ALL} samples fewer --allow-missing", f"{SCORE_ALL} samples fewer", fewer_samples
    ),
    "Error: ... was measured differently: ... is ... for ... but ... for ...: score both again, or ...": Case(
        "--force", f"{COMPARE} --force", COMPARE, scores_by_other_weights
    ),
    # diffusers
    "SolverError: the table has ... steps of ... evaluations and no other number: pass ...": Case(
        "leave `num_inference_steps` out", pipe(), pipe(num_inference_steps=50)
    ),
    "TypeError: EPDPipeline.__call__() got an unexpected keyword argument 'ip_adapter_image'": Case(
        "leave the argument out", pipe(), pipe(ip_adapter_image=None)
    ),
    # Launchers
    "torch.distributed.DistNetworkError: The server socket has failed to listen on any ... EADDRINUSE, ...": Case(
        "torchrun --standalone",
        f"torchrun --standalone --nproc_per_node=1 {LAUNCH.removeprefix('python ')} --dry-run",
        f"torchrun --nproc_per_node=1 --master_port=$PORT {LAUNCH.removeprefix('python ')} --dry-run",
        port_in_use,
    ),
    "Error: rank ... could not join the process group at ... (...): is the port free ...?": Case(
        "torchrun --nproc_per_node=N -m training.ppo.launch",
        "torchrun --nproc_per_node=N -m training.ppo.launch --config embedded",
        f"exec {LAUNCH} --device cpu --override run.timeout_minutes=0.03",
        one_of_two,
        parses=True,
    ),
    "Error: rank ... stops, for another one is lost or hangs: ...": Case(
        "--override run.timeout_minutes=60",
        f"{LAUNCH} --override run.timeout_minutes=60",
        with_a_rank_that_hangs,
    ),
    # Terminals and locales
    "Error: --override ...: the encoding of this locale cannot read it; set PYTHONUTF8=1": Case(
        "PYTHONUTF8=1",
        f"LC_ALL=C PYTHONUTF8=1 {LAUNCH} --override run.run_name=schön --dry-run",
        f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {LAUNCH} --override run.run_name=schön --dry-run",
    ),
}


# --- What prints no message ----------------------------------------------------------------------------------------


def is_slow(text: str) -> None:
    """The figures are those of the page that has the measurement."""
    measured = " ".join((ROOT / "docs/sampling.md").read_text(encoding="utf-8").split())
    for fact in ("export OMP_WAIT_POLICY=PASSIVE", "of 16 rows fell from 4.6 s to 0.3 s"):
        assert fact in text and fact in measured


def waits_for_ever(text: str) -> None:
    setting = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    assert setting in text and setting in (ROOT / "train.sh").read_text(encoding="utf-8")


def ignores_ctrl_c(text: str) -> None:
    """The first signal changes nothing, the second one ends it, and what is finished is kept."""
    assert "`kill -TERM`" in text
    many = f"python sample.py --predictor-path {TABLE} --prompt apple --batch 1 --outdir many --seeds"
    script = f"{sys.executable} {many.removeprefix('python ')} 0-5000 & echo $!; wait"
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as shell:
        assert shell.stdout is not None
        sampling = int(shell.stdout.readline())
        try:
            wait_for_pictures(shell, 1)
            os.kill(sampling, signal.SIGINT)
            wait_for_pictures(shell, len(pictures()) + 5)
            os.kill(sampling, signal.SIGTERM)
            shell.wait(20)
        finally:
            if shell.poll() is None:
                os.kill(sampling, signal.SIGKILL)
    assert "0 images to make, 5 finished before" in run(f"{many} 0-4").output


def pictures() -> list[Path]:
    return list(Path("many").rglob("*.png"))


def wait_for_pictures(shell: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(pictures()) < count:
        assert shell.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


SYMPTOMS = {
    "Training on the CPU is many times slower than it should be": is_slow,
    "After a crash, the processes that torchrun starts again wait for ever": waits_for_ever,
    "A command in the background does not stop on Ctrl-C or SIGINT": ignores_ctrl_c,
}
ENTRIES = entries()


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A checkout with a finished run of two steps, a start table and two pictures made with it."""
    folder = tmp_path_factory.mktemp("stock")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "small.yaml").write_text(SMALL)
    (folder / "prompts.txt").write_text("a red apple\na blue bird\n")
    (folder / "own").mkdir()
    (folder / "own/mistaken_rewards.py").write_text(REWARDS)
    with contextlib.chdir(folder):
        done(LAUNCH)
        (made,) = Path("exps").iterdir()
        made.rename(RUN)
        done(f"{START} --outdir start")
        done(f"{SAMPLE} samples --seeds 0-1")
    return folder


@pytest.fixture
def folder(stock, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder, with a cache of its own."""
    copy = tmp_path / "work"
    shutil.copytree(stock, copy, symlinks=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("EPD_CACHE", str(copy / "cache"))
    monkeypatch.delenv("HPS_ROOT", raising=False)
    monkeypatch.syspath_prepend(copy / "own")
    return copy


def test_page_and_cases_have_the_same_entries():
    assert set(ENTRIES) == CASES.keys() | SYMPTOMS.keys()
    assert {title for title, entry in ENTRIES.items() if not entry.is_message} == SYMPTOMS.keys()
    only_on_a_gpu = {title for title, case in CASES.items() if case.wrong is None}
    assert {title for title, entry in ENTRIES.items() if entry.mark == "GPU"} == only_on_a_gpu


def names(titles: Iterable[str]) -> list[str]:
    return [re.sub(r"\W+", "-", title)[:60] for title in titles]


@pytest.mark.parametrize("title", CASES, ids=names(CASES))
def test_mistake_says_this_and_is_mended_so(title, folder):
    entry, case = ENTRIES[title], CASES[title]
    if case.wrong is None:
        assert is_in_the_code(entry.title)
    else:
        with case.damage():
            outcome = run(case.wrong)
            assert pattern(entry.title).search(outcome.output), outcome.output
            assert outcome.exit_code == entry.exit_code, outcome.output
    assert case.fix in entry.text
    if re.match("--|python|torchrun", case.fix):
        assert case.fix in str(case.mended)
    if case.parses:
        assert fault_of(str(case.mended)) is None
    else:
        outcome = run(case.mended)
        assert outcome.exit_code == 0, outcome.output
        assert not pattern(entry.title).search(outcome.output), outcome.output


@pytest.mark.parametrize("title", SYMPTOMS, ids=names(SYMPTOMS))
def test_symptom_without_a_message(title, folder):
    SYMPTOMS[title](ENTRIES[title].text)


def test_a_message_that_has_changed_is_noticed():
    assert is_in_the_code("Error: step ...: the GPU's memory does not suffice; make fewer images")
    assert not is_in_the_code("Error: step ...: the memory of the GPU does not suffice; make fewer images")
    assert pattern("seed ... has no prompt").search("Error: seed 2 has no prompt: 2")
    assert not pattern("seed ... has no prompts").search("Error: seed 2 has no prompt: 2")
