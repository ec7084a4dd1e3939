"""A model by its name on the hub: the real client against a small hub of our own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from torch_utils.download_util import ASSETS, DownloadError, check_file_by_key, is_hub_id, locate
from training.denoisers import EMBEDDED, ModelError, check_model

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "c" * 40
PINNED = ASSETS["ms_coco"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder` as the repository me/emoji at the tag v1."""

    def do_HEAD(self):
        name = self.path.removeprefix("/me/emoji/resolve/v1/")
        file = self.server.folder / name
        if name == self.path or not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.server.fetched.append(name)
            self.wfile.write(data)

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(EMBEDDED, folder)
    # As the published folders are: the vocabulary in two files.
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer/special_tokens_map.json").write_text("{}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.fetched = folder, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(hub, tmp_path, offline: bool) -> subprocess.CompletedProcess:
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    program = (
        "import torch\nfrom training.denoisers import create_model\nfrom torch_utils.errors import UserError\n"
        "try:\n    named = create_model('emoji', model_path='me/emoji@v1')\n"
        "except UserError as error:\n    print(error)\n    raise SystemExit(2)\n"
        "here = create_model('emoji')\n"
        "print(torch.equal(named.encode_prompts(['a cat']).text, here.encode_prompts(['a cat']).text))\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(tmp_path / "hub"),
        "EPD_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_named_model_is_fetched_once_and_is_the_model(hub, tmp_path):
    refused = ask(hub, tmp_path, offline=True)
    assert refused.returncode == 2 and hub.fetched == []
    for part in ("me/emoji@v1 (no such folder here)", "unet/config.json", "/tree/v1", "me--emoji@v1", "HF_HUB_OFFLINE"):
        assert part in refused.stdout
    first = ask(hub, tmp_path, offline=False)
    assert first.stdout == "True\n", first.stderr
    assert sorted(hub.fetched) == sorted(file.name for file in PINNED.files)
    assert ask(hub, tmp_path, offline=True).stdout == "True\n"
    assert len(hub.fetched) == len(PINNED.files)


def test_a_model_that_lacks_a_file_is_named(hub, tmp_path):
    (hub.folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    refused = ask(hub, tmp_path, offline=False)
    assert refused.returncode == 2 and len(refused.stdout.splitlines()) == 1
    assert "cannot fetch vae/diffusion_pytorch_model.safetensors" in refused.stdout


@pytest.mark.parametrize("name", [PINNED.repo, f"{PINNED.repo}@{PINNED.revision}"])
def test_the_repository_that_is_known_has_its_hashes(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match=PINNED.files[-1].sha256):
        check_file_by_key(name)
    with pytest.raises(DownloadError) as caught:
        check_file_by_key(f"{PINNED.repo}@main")
    assert PINNED.files[-1].sha256 not in str(caught.value) and "tree/main" in str(caught.value)


PRESET = ("--config", ROOT / "training/ppo/cfgs/sd15_single.yaml")
NAMED = ("--dataset-name", "ms_coco", "--prompt", "x", "--seeds", "0")


@pytest.mark.parametrize(
    ("command", "asks"),
    [
        ([ROOT / "sample.py", "--predictor_path", ROOT / "docs/learning.md"], False),
        ([ROOT / "sample_baseline.py", "--sampler", "ddim", *NAMED], True),
        (["-m", "training.ppo.launch", *PRESET], True),
        (["-m", "training.distill", *PRESET], True),
        (["-m", "training.ppo.scripts.score_hps", "--images", ROOT / "docs"], False),
    ],
)
def test_commands_take_the_cache_folder(command, asks, tmp_path):
    """Those that get so far say that what they lack is to be put there."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *command, "--cache-dir", tmp_path / "elsewhere"]
    ended = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stderr.startswith("Error: ") and len(ended.stderr.splitlines()) == 1
    assert (str(tmp_path / "elsewhere") in ended.stderr) == asks
    assert os.listdir(tmp_path) == []


def test_what_is_no_name(tmp_path, monkeypatch):
    for text in ("name", "/a/b", "../b", "a/../b", "a/b/c", "a/b@", "a b/c", "a/b\n", "~/b", "a/.b"):
        assert not is_hub_id(text), text
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    assert locate("me/emoji") is None and check_model("ms_coco", model_path="me/emoji") is None
    with pytest.raises(ModelError, match=r"a/b.safetensors does not exist"):
        check_model("ms_coco", model_path="a/b.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/emoji").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"me/emoji lacks"):  # a folder comes first
        check_model("ms_coco", model_path="me/emoji")
