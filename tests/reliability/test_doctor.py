"""The doctor: what is fine here, what is found when it is not, that every fault is found at once, and no trace left."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from torch_utils import download_util
from torch_utils.download_util import (
    ASSETS,
    KnownFile,
    find_asset,
    locate,
    remembered_sha256,
    stamped_sha256,
    stored_folder,
)
from training.denoisers import EMBEDDED
from training.ppo import doctor
from training.ppo.reward_models.imagereward import VOCABULARY_ASSET
from training.ppo.reward_multi import PUBLISHED
from training.table import SolverTable, save_table

ROOT = Path(__file__).resolve().parents[2]
SD15 = ROOT / "training" / "ppo" / "cfgs" / "sd15_single.yaml"
GROUPS = ["environment", "devices", "configuration", "weights", "folders"]
HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Started in the checkout, with a cache, a folder of weights and a cache of the hub that are empty."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HPS_ROOT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download_util, "PROJECT", tmp_path / "project")
    (tmp_path / "exps").mkdir()
    (tmp_path / "exps" / "kept.txt").write_text("of an earlier run")
    return tmp_path


class Report:
    """What the doctor says: its lines in order, and what stands under one of them."""

    def __init__(self, text: str):
        lines = text.splitlines()
        self.text, self.verdict = text, lines[-1]
        self.groups = [line for line in lines[:-1] if not line.startswith(" ")]
        self.lines: list[tuple[str, str, str]] = []
        self.ways: dict[str, list[str]] = {}
        for line in lines[:-1]:
            if line.startswith(" " * doctor.INDENT):
                self.ways.setdefault(self.lines[-1][1], []).append(line.strip())
            elif line.startswith(" "):
                status, what = line[2 : doctor.INDENT].split(maxsplit=1)
                self.lines.append((status, what.strip(), line[doctor.INDENT :]))

    def faults(self) -> list[str]:
        return [what for status, what, _ in self.lines if status not in ("ok", "note")]

    def said(self, what: str) -> str:
        """Everything about one thing, its ways included."""
        return "\n".join([f"{s} {t}" for s, name, t in self.lines if name == what] + self.ways.get(what, []))


def diagnose(root: Path, *arguments: object, exit_code: int, config: Path = doctor.PRESET) -> Report:
    options = ["--config", config, "--device", "cpu", "--override", f"run.output_root={root}/exps", *arguments]
    result = CliRunner().invoke(doctor.main, [str(option) for option in options])
    assert result.exit_code == exit_code, result.output
    report = Report(result.stdout)
    assert report.groups == GROUPS
    assert report.verdict.startswith("training cannot start: " if exit_code else "training can start: ")
    return report


def override(*items: object) -> list[object]:
    return [part for item in items for part in ("--override", item)]


HPS = override("reward.type=hps")


def tree(root: Path) -> dict[str, float]:
    return {str(path.relative_to(root)): path.stat().st_mtime for path in root.rglob("*") if path.name != "exps"}


def test_the_embedded_preset_is_fine_and_leaves_nothing_behind(here):
    before = tree(here)
    report = diagnose(here, exit_code=0)
    assert report.faults() == [] and not report.ways
    named = [what for _, what, _ in report.lines]
    for what in ("Python", "transformers", "torch, torchvision", "GPUs", "configuration", "start table", "prompts"):
        assert what in named
    for what in ("processes", "model", "reward emoji_reward", "metric emoji_heldout", "run folders", "disk", "cache"):
        assert what in named
    assert "4000 to train on, 64 held out" in report.said("prompts")
    assert "python -m training.ppo.launch --config training/ppo/cfgs/embedded.yaml" in report.verdict
    assert tree(here) == before


def test_hashes_of_our_own_weights_are_told_when_they_are_read(here):
    report = diagnose(here, "--hashes", exit_code=0)
    for what, path in (("reward emoji_reward", "reward/model"), ("model", "unet/diffusion_pytorch_model")):
        digest = hashlib.sha256((EMBEDDED / f"{path}.safetensors").read_bytes()).hexdigest()
        assert f"has SHA-256 {digest[:12]}" in report.said(what)
    assert not (here / "cache").exists()


def test_without_a_configuration_the_rest_is_still_checked(here):
    report = diagnose(here, *override("ppo.kl_coeff=0.5"), exit_code=1)
    assert report.faults() == ["configuration"]
    assert "unknown key `ppo.kl_coeff`; did you mean `ppo.kl_coef`?" in report.said("configuration")
    assert "training/ppo/cfgs/embedded.yaml" in report.ways["configuration"][0]
    for what in ("start table", "prompts", "weights", "run folders"):
        assert report.said(what) == "note not checked: there is no configuration"
    assert "free" in report.said("cache")
    gone = diagnose(here, exit_code=1, config=here / "none.yaml")
    assert "No such file" in gone.said("configuration")


def test_unknown_names(here):
    report = diagnose(here, *override("model.dataset_name=imagenet", "reward.type=hpsv3"), exit_code=1)
    assert report.faults() == ["names", "reward hpsv3"]
    assert "model.dataset_name=imagenet is unknown; use one of emoji, ms_coco" in report.said("names")


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_a_damaged_start_table(here, suffix):
    path = here / f"table{suffix}"
    save_table(SolverTable(positions=[[0.3, 0.6]] * 5, weights=[[0.5, 0.5]] * 5), path)
    snapshot = override(f"data.predictor_snapshot={path}")
    whole = diagnose(here, *snapshot, exit_code=0)
    assert f"{path}, 5 intervals of 2 points" in whole.said("start table")
    assert "was made for dataset_name=ms_coco" in whole.said("start table")
    path.write_bytes(path.read_bytes()[:-40])
    report = diagnose(here, *snapshot, exit_code=1)
    assert report.faults() == ["start table"]
    assert str(path) in report.lines[[what for _, what, _ in report.lines].index("start table")][2]
    make_anew, cold = report.ways["start table"]
    assert make_anew.startswith("python -m training.distill --config ") and make_anew.endswith(f"--output {path}")
    assert cold == "or --override data.predictor_snapshot=null begins from the cold start"
    diagnose(here, *snapshot, *override("data.predictor_snapshot=null"), exit_code=0)


@pytest.mark.parametrize("key", ["data.prompt_csv", "evaluation.prompt_file"])
def test_prompts_that_are_not_there(here, key):
    report = diagnose(here, *override(f"{key}={here}/gone.txt"), exit_code=1)
    assert report.faults() == ["named files", "prompts"]
    assert f"{key}={here}/gone.txt does not exist" in report.said("named files")
    assert "gone.txt: No such file" in report.said("prompts") and "--override data.prompt_csv" in report.said("prompts")


def test_what_stable_diffusion_lacks_is_named_with_its_source_and_its_command(here):
    report = diagnose(here, exit_code=1, config=SD15)
    assert report.faults() == ["prompts", "model", "reward hps"]
    hps, prompts, model = ASSETS["hps_v2.1"], ASSETS["prompts"], ASSETS["ms_coco"]
    for what, asset in (("reward hps", hps), ("prompts", prompts), ("model", model)):
        said = report.said(what)
        assert said.startswith("missing ")
        for part in (asset.files[0].name, asset.source(), str(here / "cache" / asset.cache_name)):
            assert part in said
        assert report.ways[what][0].startswith(f"EPD_CACHE={here}/cache python ")
    assert "1.8 GiB" in report.said("reward hps") and hps.files[0].sha256 in report.said("reward hps")
    assert "python -m training.ppo.scripts.score_all --metrics hps --fetch-only" in report.ways["reward hps"][0]
    size = sum(file.size or 0 for asset in (hps, prompts, model) for file in asset.files)
    assert f"at least {doctor.readable(size)} to fetch" in report.said("cache")


def test_the_commands_that_fetch_are_commands(here, monkeypatch):
    """Without a network they say what is missing, and where it belongs."""
    monkeypatch.setenv("HPS_ROOT", str(here / "hps"))
    report = diagnose(here, *HPS, *override("model.model_path=me/other"), exit_code=1)
    for what, name in (("model", "me/other"), ("reward hps", "HPS_v2.1_compressed.pt")):
        command = report.ways[what][0].replace(" python ", f" {sys.executable} ")
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert result.returncode != 0 and "HF_HUB_OFFLINE forbids downloads" in result.stderr and name in result.stderr


def put(root: Path, key: str, content: bytes) -> Path:
    path = root / "cache" / ASSETS[key].cache_name / ASSETS[key].files[0].name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_weights_of_another_size(here):
    path = put(here, "hps_v2.1", b"hello")
    report = diagnose(here, *HPS, exit_code=1)
    assert report.faults() == ["reward hps"]
    assert f"bad {path} has 5 bytes, expected 1972490005" in report.said("reward hps")
    assert report.ways["reward hps"][0].startswith(f"rm {path}, then ")
    put(here, "hps_v2.1", b"")
    assert "is empty" in diagnose(here, *HPS, exit_code=1).said("reward hps")
    assert not (here / "cache" / "verified").exists()


def test_weights_of_another_content_are_found_by_their_hash(here, monkeypatch):
    """Read with --hashes, or remembered from a run that read them; else the report says that nothing was compared."""
    known = KnownFile("HPS_v2.1_compressed.pt", 5, HELLO)
    monkeypatch.setitem(ASSETS, "hps_v2.1", replace(ASSETS["hps_v2.1"], files=(known,)))
    path = put(here, "hps_v2.1", b"hallo")
    assert "SHA-256 not compared (--hashes does)" in diagnose(here, *HPS, exit_code=0).said("reward hps")
    report = diagnose(here, *HPS, "--hashes", exit_code=1)
    assert f"{path} has SHA-256 {hashlib.sha256(b'hallo').hexdigest()}, expected {HELLO}" in report.said("reward hps")
    assert not (here / "cache" / "verified").exists()
    stamped_sha256(path)
    assert "has SHA-256" in diagnose(here, *HPS, exit_code=1).said("reward hps")
    put(here, "hps_v2.1", b"hello")
    assert "not compared" in diagnose(here, *HPS, exit_code=0).said("reward hps")  # what was remembered is out of date
    stamped_sha256(path)
    report = diagnose(here, *HPS, exit_code=0)
    assert "SHA-256 as published (1 of 1 files)" in report.said("reward hps")


def test_what_is_remembered_is_what_was_stamped(here):
    path = here / "file"
    path.write_bytes(b"hello")
    assert remembered_sha256(path) is None and not (here / "cache").exists()
    assert stamped_sha256(path) == remembered_sha256(path) == HELLO
    os.utime(path, ns=(10**18, 10**18))
    assert remembered_sha256(path) is None


def test_files_are_found_where_locate_finds_them(here, monkeypatch):
    asset = replace(ASSETS["hps_v2.1"], files=(KnownFile("sub/file", 5, HELLO),))
    monkeypatch.setitem(ASSETS, asset.key, asset)
    commit = Path(constants.HF_HUB_CACHE) / "models--xswu--HPSv2" / "snapshots" / asset.revision
    monkeypatch.setenv("HPS_ROOT", str(here / "own"))
    for folder in (None, commit, here / "own"):
        if folder is not None:
            (folder / "sub").mkdir(parents=True)
            (folder / "sub" / "file").write_bytes(b"hello")
        assert stored_folder(asset) == folder
        assert locate(asset.key) == (folder / "sub" / "file" if folder else None)
    monkeypatch.delenv("HPS_ROOT")
    for folder in asset.folders()[::-1]:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").write_bytes(b"hello")
        assert stored_folder(asset) == folder and locate(asset.key) == folder / "sub" / "file"


def test_weights_of_your_own(here):
    path = here / "own.pt"
    report = diagnose(here, *HPS, *override(f"reward.weights_path={path}"), exit_code=1)
    assert f"{path} is missing: download HPS_v2.1_compressed.pt" in report.said("reward hps")
    path.write_bytes(b"hello")
    report = diagnose(here, *HPS, *override(f"reward.weights_path={path}"), "--hashes", exit_code=0)
    assert f"own.pt has SHA-256 {HELLO[:12]}..." in report.said("reward hps")
    # Under the published name it has to be the published file; with no file there, the usual place is meant.
    path.rename(here / "HPS_v2.1_compressed.pt")
    named = override(f"reward.weights_path={here}/HPS_v2.1_compressed.pt")
    assert "expected 1972490005" in diagnose(here, *HPS, *named, exit_code=1).said("reward hps")
    (here / "HPS_v2.1_compressed.pt").unlink()
    assert diagnose(here, *HPS, *named, exit_code=1).said("reward hps").startswith("missing ")


def test_rewards_that_read_two_files(here):
    assert all((known.find_other is None) == (known.other_key is None) for known in PUBLISHED.values())
    assert PUBLISHED["imagereward"].other_key == VOCABULARY_ASSET and PUBLISHED["aesthetic"].other_key in ASSETS
    metrics = "evaluation.metrics=[aesthetic, imagereward, mps]"
    report = diagnose(here, *override(metrics), exit_code=1)
    for metric, names in (
        ("aesthetic", ["sac+logos+ava1-l14-linearMSE.pth", "model.safetensors"]),
        ("imagereward", ["ImageReward.pt", "vocab.txt"]),
        ("mps", ["MPS_overall_checkpoint.pth"]),
    ):
        said = report.said(f"metric {metric}").splitlines()
        assert [line.split(",")[0] for line in said[: len(names)]] == [f"missing {name}" for name in names]
    assert report.ways["metric mps"][0].startswith("by hand: ")  # shared on a drive


def test_a_reward_of_your_own_that_fails(here, monkeypatch):
    (here / "odd.py").write_text("raise RuntimeError('no licence\\nfound')\n")
    monkeypatch.syspath_prepend(str(here))
    report = diagnose(here, *override("reward.type=odd:score"), exit_code=1)
    assert report.faults() == ["reward odd:score"]
    assert "RuntimeError: no licence found" in report.text


def test_a_model_folder_that_is_damaged_or_incomplete(here):
    folder = here / "model"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("reward", "heldout"))
    named = override(f"model.model_path={folder}")
    assert str(folder) in diagnose(here, *named, exit_code=0).said("model")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(unet, unet.stat().st_size - 1)
    report = diagnose(here, *named, exit_code=1)
    assert f"{unet} cannot be read as safetensors" in report.said("model")
    assert "--override model.model_path=PATH" in report.said("model")
    unet.unlink()
    report = diagnose(here, *named, exit_code=1)
    assert report.faults() == ["model"]
    assert f"model folder {folder} lacks unet/diffusion_pytorch_model.safetensors" in report.said("model")


def test_a_model_of_the_hub_that_is_not_here(here):
    pinned = ASSETS["ms_coco"]
    assert find_asset(f"{pinned.repo}@{pinned.revision}") == find_asset("ms_coco") == pinned
    assert find_asset(f"{pinned.repo}@main").key not in ASSETS
    report = diagnose(here, *override("model.model_path=me/other@v1"), exit_code=1)
    assert report.said("model").startswith("missing me/other@v1 of the Hugging Face hub")
    assert str(here / "cache" / "hub" / "me--other@v1") in report.said("model")


@pytest.mark.parametrize(("root", "words"), [("{}/file/exps", "is a file"), ("/proc/doctor", "cannot write in /proc")])
def test_an_output_root_that_cannot_be_written(here, root, words):
    (here / "file").write_text("")
    report = diagnose(here, *override(f"run.output_root={root.format(here)}"), exit_code=1)
    assert report.faults() == ["run folders"]
    assert words in report.said("run folders") and "--override run.output_root=FOLDER" in report.said("run folders")


def test_a_cache_that_cannot_be_made_matters_where_something_is_to_be_fetched(here):
    (here / "file").write_text("")
    cache = ["--cache-dir", here / "file" / "cache"]
    diagnose(here, *cache, exit_code=0)
    report = diagnose(here, *HPS, *cache, exit_code=1)
    assert f"cannot be made: {here}/file is a file" in report.said("cache")


def test_a_batch_that_the_processes_do_not_divide(here):
    report = diagnose(here, "--processes", 3, exit_code=1)
    assert report.faults() == ["processes"]
    assert "ppo.rollout_batch_size=8 is not a multiple of the 3 processes" in report.said("processes")
    larger, fewer = report.ways["processes"]
    assert fewer == "or 2 of 3 processes: torchrun --nproc_per_node=2"
    mended = diagnose(here, "--processes", 3, *larger.split(), exit_code=0)
    assert "3, each with 4 of the 12 images" in mended.said("processes")


def test_all_faults_are_found_at_once(here):
    (here / "table.json").write_text("{}")
    (here / "file").write_text("")
    put(here, "hps_v2.1", b"hello")
    before = tree(here)
    several = override(
        f"data.predictor_snapshot={here}/table.json",
        f"data.prompt_csv={here}/gone.txt",
        f"model.model_path={here}/model",
        f"run.output_root={here}/file/exps",
        "reward.type=hps",
        "evaluation.metrics=[pick]",
    )
    report = diagnose(here, *several, "--processes", 3, exit_code=1)
    expected = ["named files", "start table", "prompts", "processes", "model", "reward hps", "metric pick"]
    assert report.faults() == [*expected, "run folders"]
    assert report.verdict == "training cannot start: 8 to mend, marked missing or bad"
    assert tree(here) == before


def test_versions_are_those_of_pyproject(here, monkeypatch):
    _, packages = doctor.requirements()
    assert len(packages) > 10 and all(doctor.REQUIREMENT.fullmatch(package) for package in packages)
    (here / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=4"\ndependencies = ["click>=999.1", "no-such-package-here>=1", "numpy>=2.0"]\n'
    )
    monkeypatch.setattr(doctor, "PROJECT", here)
    report = diagnose(here, exit_code=1)
    assert report.faults() == ["Python", "click", "no-such-package-here"]
    assert "but >=999.1 needed" in report.said("click") and "bash train.sh makes .venv" in report.said("click")
    (here / "pyproject.toml").write_text('[project]\nrequires-python = ">=3"\ndependencies = ["numpy~=2.0"]\n')
    assert "'numpy~=2.0' cannot be read" in diagnose(here, exit_code=1).said("packages")


def test_versions_of_an_installed_copy_are_those_of_its_metadata(here, monkeypatch):
    folder = here / "site" / "epd_rdpo-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: epd-rdpo\nVersion: 0.1.0\nRequires-Python: >=3.11,<3.14\n"
        'Requires-Dist: click>=8.1\nProvides-Extra: test\nRequires-Dist: pytest>=8.0; extra == "test"\n'
    )
    monkeypatch.syspath_prepend(str(here / "site"))
    monkeypatch.setattr(doctor, "PROJECT", here)
    assert doctor.requirements() == (">=3.11,<3.14", ["click>=8.1"])


@pytest.mark.parametrize(
    ("version", "wanted", "fitting"),
    [
        ("3.11.7", ">=3.11,<3.14", True),
        ("3.14.0", ">=3.11,<3.14", False),
        ("3.9", ">=3.11", False),
        ("2.15.0+cu130", ">=2.11", True),
        ("2", ">=2.0", True),
        ("1.26.4", ">=2.0", False),
        ("5.0.0rc1", ">=5.0", True),
    ],
)
def test_ranges(version, wanted, fitting):
    assert doctor.fits(version, wanted) is fitting


def run(here: Path, program: list[str], **changed: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | changed
    return subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=120)


def test_broken_packages_are_lines_of_the_report(here):
    """As beside a build of torch that torchvision was not made for; and one that nearly everything needs."""
    (here / "broken").mkdir()
    (here / "broken" / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (here / "broken" / "omegaconf.py").write_text("raise ImportError('no omegaconf')")
    result = run(here, ["-m", "training.ppo.doctor", "--device", "cpu"], PYTHONPATH=str(here / "broken"))
    assert result.returncode == 1, result.stderr
    report = Report(result.stdout)
    assert report.groups == GROUPS and "Traceback" not in result.stderr
    assert report.faults() == ["torch, torchvision", "configuration"]
    assert "RuntimeError: operator torchvision::nms does not exist" in report.said("torch, torchvision")
    assert "ImportError: no omegaconf" in report.said("configuration")


def test_nothing_asks_the_network(here):
    options = ["--config", str(SD15), "--device", "cpu", "--override", "model.model_path=me/x"]
    program = (
        "import sys; seen = set()\n"
        "sys.addaudithook(lambda event, _: seen.add(event) if event.startswith('socket.') else None)\n"
        "from training.ppo import doctor\n"
        f"try:\n    doctor.main({options!r})\n"
        "except SystemExit as end:\n    print(end.code, seen & {'socket.connect', 'socket.getaddrinfo'})\n"
    )
    result = run(here, ["-c", program])
    assert result.stdout.splitlines()[-1] == "1 set()", result.stdout + result.stderr
    assert "missing  model" in result.stdout
    assert not (here / "cache").exists()


@pytest.mark.parametrize("arguments", [["--device", "gpu"], ["--processes", "0"], ["--hash", "x"], ["extra"]])
def test_wrong_use(arguments):
    result = CliRunner().invoke(doctor.main, arguments)
    assert result.exit_code == 2 and result.stdout == ""


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from training.ppo.doctor import main;"
        "main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules or 'omegaconf' in sys.modules)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert time.perf_counter() - started < 2
