"""Downloads from a real local server that can also misbehave, and the files that the project knows."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from dnnlib import DownloadError, EasyDict, cache_dir, open_url
from dnnlib.util import download, within
from torch_utils import download_util
from torch_utils.download_util import ASSETS, Asset, KnownFile, by_hand, check_file_by_key, locate, stamped_sha256

ROOT = Path(__file__).resolve().parents[1]
CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        # The hub's client asks under /api for things of its own before it asks for the file.
        if self.path.startswith(("/stalled", "/xswu/", "/api/")):
            self.server.release.wait(20)
            return
        if self.path == "/absent":
            self.send_error(404)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file.bin")
            self.end_headers()
            return
        if self.path == "/large":
            self.send_large()
            return
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:-1000] if self.path in ("/short", "/unannounced") else CONTENT)

    def send_large(self):
        """Goes on where it is asked to if the content is the same; breaks off in the middle as often as told."""
        server, first = self.server, 0
        same = self.headers.get("If-Range") == server.etag
        if same:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if same and first >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if same else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(server.content) - first))
        self.end_headers()
        server.sent.append(first)
        time.sleep(server.pause)
        breaks = server.breaks > 0
        server.breaks -= breaks
        self.wfile.write(server.content[first : first + 500_000] if breaks else server.content[first:])

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HPS_ROOT", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.release = [], threading.Event()
    httpd.content, httpd.etag, httpd.breaks, httpd.sent = CONTENT, '"one"', 0, []
    httpd.pause = 0.0
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def read(url: str, **options) -> bytes:
    with open_url(url, **options) as file:
        return file.read()


def files_below(folder: Path) -> list[str]:
    """All but locks and what is kept of downloads that broke off."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".lock", ".part", ".etag")]
    return sorted(str(p.relative_to(folder)) for p in files)


def test_easy_dict():
    d = EasyDict(a=1, b={"c": 2})
    d.x = 3
    assert d == {"a": 1, "b": {"c": 2}, "x": 3}
    assert d.a == d["a"] == 1
    del d.a
    assert "a" not in d
    with pytest.raises(AttributeError, match="a"):
        _ = d.a
    with pytest.raises(AttributeError, match="a"):
        del d.a


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("EPD_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    for unset in (lambda: monkeypatch.setenv("EPD_CACHE", ""), lambda: monkeypatch.delenv("EPD_CACHE")):
        unset()
        assert cache_dir() == Path.home() / ".cache" / "epd"


def test_open_url_fetches_once(server, tmp_path):
    assert read(f"{server.url}/file.bin", sha256=SHA256) == CONTENT
    assert read(f"{server.url}/file.bin", sha256=SHA256.upper()) == CONTENT
    assert server.requests == ["/file.bin"]
    assert read(f"{server.url}/moved", cache_dir=tmp_path / "own") == CONTENT
    assert len(files_below(tmp_path / "own")) == 1
    assert len(files_below(tmp_path / "cache" / "downloads")) == 1


def test_equal_names_at_different_addresses_are_different_files(server):
    read(f"{server.url}/a/file.bin")
    read(f"{server.url}/b/file.bin")
    read(f"{server.url}/b/file.bin?version=2")
    assert server.requests == ["/a/file.bin", "/b/file.bin", "/b/file.bin?version=2"]


def test_open_url_notices_damage_in_the_cache(server, tmp_path):
    read(f"{server.url}/file.bin")
    (stored,) = (tmp_path / "cache" / "downloads").glob("*.bin")
    stored.write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=re.escape(stored.name)):
        read(f"{server.url}/file.bin", sha256=SHA256)


def test_open_url_of_a_local_file(tmp_path):
    (tmp_path / "a b.txt").write_bytes(b"local")
    url = (tmp_path / "a b.txt").as_uri()
    assert read(url, sha256=hashlib.sha256(b"local").hexdigest()) == b"local"
    with pytest.raises(DownloadError, match="SHA-256"):
        read(url, sha256=SHA256)
    with pytest.raises(DownloadError, match="missing"):
        read((tmp_path / "missing").as_uri())


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/absent", {}, "404"),
        ("/short", {}, "broke off after 1279000 of 1280000 bytes"),
        ("/unannounced", {"size": len(CONTENT)}, "broke off after 1279000 of 1280000"),
        ("/unannounced", {"sha256": SHA256}, "SHA-256"),
        ("/file.bin", {"size": 7}, "has 1280000 bytes, expected 7"),
        ("/file.bin", {"sha256": "0" * 64}, f"has SHA-256 {SHA256}, expected 000"),
        ("/stalled", {"timeout": 0.2}, "timed out"),
    ],
)
def test_failed_downloads_leave_nothing_and_keep_the_old_file(server, tmp_path, path, options, message):
    for old in (None, b"old"):
        if old is not None:
            (tmp_path / "f").write_bytes(old)
        with pytest.raises(DownloadError) as caught:
            download(server.url + path, tmp_path / "f", **options)
        assert message in str(caught.value)
        assert server.url + path in str(caught.value)
        assert "\n" not in str(caught.value)
        assert files_below(tmp_path) == ([] if old is None else ["f"])
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_download_that_broke_off_goes_on(server, tmp_path):
    server.breaks = 2
    for _ in range(2):
        with pytest.raises(DownloadError, match="broke off after"):
            download(f"{server.url}/large", tmp_path / "f")
    download(f"{server.url}/large", tmp_path / "f", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.sent == [0, 500_000, 1_000_000]
    assert sorted(os.listdir(tmp_path)) == [".f.lock", "f"]


def test_a_download_that_died_at_its_end_begins_anew(server, tmp_path):
    server.breaks = 1
    with pytest.raises(DownloadError):
        download(f"{server.url}/large", tmp_path / "f")
    (tmp_path / ".f.part").write_bytes(CONTENT)
    download(f"{server.url}/large", tmp_path / "f", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT and server.sent == [0, 0]


def test_what_came_of_another_content_is_not_gone_on_with(server, tmp_path):
    server.breaks = 1
    with pytest.raises(DownloadError, match="broke off after 500000 of 1280000 bytes; try again"):
        download(f"{server.url}/large", tmp_path / "f")
    server.content, server.etag = CONTENT[::-1], '"two"'
    download(f"{server.url}/large", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1] and server.sent == [0, 0]


def test_a_damaged_part_is_thrown_away(server, tmp_path):
    server.breaks = 1
    with pytest.raises(DownloadError):
        download(f"{server.url}/large", tmp_path / "f")
    (tmp_path / ".f.part").write_bytes(b"x" * 500_000)
    with pytest.raises(DownloadError, match="has SHA-256"):
        download(f"{server.url}/large", tmp_path / "f", sha256=SHA256)
    download(f"{server.url}/large", tmp_path / "f", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_who_comes_while_another_fetches_waits_and_takes_its_file(server, tmp_path):
    server.pause = 0.5
    with ThreadPoolExecutor(3) as pool:  # each opens the lock for itself, as processes do
        list(pool.map(lambda _: download(f"{server.url}/large", tmp_path / "f"), range(3)))
    assert server.sent == [0] and (tmp_path / "f").read_bytes() == CONTENT
    download(f"{server.url}/large", tmp_path / "f")
    assert server.sent == [0, 0]


@pytest.mark.parametrize("url", ["weights.bin", "/etc/passwd", "ftp://host/file", ""])
def test_other_addresses_are_refused(url):
    with pytest.raises(DownloadError, match="must start with http"):
        open_url(url)


def test_within_hands_on_answers_and_errors_and_ends_waiting():
    assert within(5, lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        within(5, lambda: {}["x"])
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 seconds"):
        within(0.2, lambda: threading.Event().wait(3))
    assert time.perf_counter() - start < 2


def test_nobody_listening(server, tmp_path):
    download(f"{server.url}/file.bin", tmp_path / "f")
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="cannot fetch"):
        download(f"{server.url}/file.bin", tmp_path / "g")


@pytest.fixture
def known(server, tmp_path, monkeypatch):
    """A project folder of its own, and three assets like the real ones but small."""
    monkeypatch.setattr(download_util, "PROJECT", tmp_path / "project")
    whole = KnownFile("file.bin", len(CONTENT), SHA256)
    for asset in (
        Asset("one", (whole,), "weights", "one", "the test", base_url=server.url, folder_env="HPS_ROOT"),
        Asset("unhashed", (KnownFile("file.bin"),), "weights", "plain", "the test", base_url=server.url),
        Asset(
            "folder",
            (KnownFile("sub/a.json"), KnownFile("file.bin", len(CONTENT), SHA256)),
            "weights/folder",
            "folder",
            "the test",
            base_url=server.url,
            is_folder=True,
        ),
    ):
        monkeypatch.setitem(ASSETS, asset.key, asset)
    return server


def test_a_missing_file_is_fetched_once_into_the_cache(known, tmp_path):
    assert locate("one") is None
    assert check_file_by_key("one") == tmp_path / "cache" / "one" / "file.bin"
    assert check_file_by_key("one") == locate("one") == tmp_path / "cache" / "one" / "file.bin"
    assert known.requests == ["/file.bin"]


def test_a_folder_gets_the_files_that_it_lacks(known, tmp_path):
    (tmp_path / "cache" / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "cache" / "folder" / "sub" / "a.json").write_text("{}")
    assert check_file_by_key("folder") == tmp_path / "cache" / "folder"
    assert known.requests == ["/file.bin"]
    assert locate("folder") == tmp_path / "cache" / "folder"


def test_the_command_fetches_several_and_says_where_they_are(known, tmp_path):
    done = CliRunner().invoke(download_util.main, ["one", "unhashed"])
    cache = tmp_path / "cache"
    assert (done.exit_code, done.stdout) == (0, f"{cache / 'one' / 'file.bin'}\n{cache / 'plain' / 'file.bin'}\n")
    assert (cache / "plain" / "file.bin").read_bytes() == CONTENT


def test_the_command_fetches_nothing_where_one_key_is_unknown(known):
    done = CliRunner().invoke(download_util.main, ["one", "two"])
    assert done.exit_code == 2 and "unknown file key 'two'; known keys: " in done.stderr
    assert known.requests == []


def test_a_copy_in_the_project_comes_first(known, tmp_path):
    check_file_by_key("one")
    (tmp_path / "project" / "weights").mkdir(parents=True)
    (tmp_path / "project" / "weights" / "file.bin").write_bytes(CONTENT)
    assert check_file_by_key("one") == tmp_path / "project" / "weights" / "file.bin"


def test_the_environment_variable_replaces_both_folders(known, tmp_path, monkeypatch):
    check_file_by_key("one")
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "hps"))
    assert locate("one") is None
    assert check_file_by_key("one") == tmp_path / "hps" / "file.bin"
    assert len(known.requests) == 2


@pytest.mark.parametrize(
    ("data", "message"), [(CONTENT[:-1], "1279999 bytes"), (CONTENT[:-1] + b"\0", "has SHA-256"), (b"", "0 bytes")]
)
def test_a_damaged_copy_is_an_error_and_stays(known, tmp_path, data, message):
    path = tmp_path / "project" / "weights" / "file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    for ask in (check_file_by_key, locate):
        with pytest.raises(DownloadError, match=message) as caught:
            ask("one")
        assert str(path) in str(caught.value)
    assert path.read_bytes() == data
    assert known.requests == []


def test_without_a_published_hash_an_empty_file_is_still_noticed(known, tmp_path):
    path = tmp_path / "cache" / "plain" / "file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"anything")
    assert check_file_by_key("unhashed") == path
    path.write_bytes(b"")
    with pytest.raises(DownloadError, match="is empty"):
        check_file_by_key("unhashed")


def test_offline_asks_no_server_and_says_what_to_do_by_hand(known, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError) as caught:
        check_file_by_key("one")
    message = str(caught.value)
    for part in ("file.bin", SHA256, known.url, str(tmp_path / "cache" / "one"), "HF_HUB_OFFLINE"):
        assert part in message
    assert "\n" not in message
    assert known.requests == []
    with pytest.raises(DownloadError, match="no hash published"):
        check_file_by_key("unhashed")
    placed = tmp_path / "cache" / "one" / "file.bin"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(CONTENT)
    assert check_file_by_key("one") == placed


def test_a_server_that_answers_wrongly_is_reported_with_the_way_by_hand(known, tmp_path, monkeypatch):
    asset = Asset("gone", (KnownFile("absent"),), "weights", "gone", "the test", base_url=known.url)
    monkeypatch.setitem(ASSETS, "gone", asset)
    with pytest.raises(DownloadError, match=r"put it into .*gone.*404"):
        check_file_by_key("gone")
    assert not (tmp_path / "cache" / "gone" / "absent").exists()


def test_an_unreachable_hub_is_reported_within_five_seconds(server, tmp_path):
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    program = (
        "import time\nfrom torch_utils.download_util import DownloadError, check_file_by_key\nstart = time.time()\n"
        "try:\n    check_file_by_key('hps_v2.1')\nexcept DownloadError as error:\n    print(error)\n"
        "print(time.time() - start)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
        "HPS_ROOT": str(tmp_path / "hps"),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    message, seconds = result.stdout.splitlines()
    assert float(seconds) < 5
    assert "HPS_v2.1_compressed.pt" in message
    assert f"put it into {tmp_path / 'hps'}" in message
    assert any(request.startswith(("/xswu/", "/api/")) for request in server.requests)
    assert files_below(tmp_path) == []


def test_the_hubs_own_cache_is_used(server, tmp_path, monkeypatch):
    content = hashlib.sha256(CONTENT).hexdigest()
    asset = Asset(
        "hub", (KnownFile("sub/a.bin", len(CONTENT), content),), "weights", "hub", "the test", "some/repo", "c" * 40
    )
    monkeypatch.setitem(ASSETS, "hub", asset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert locate("hub") is None
    path = tmp_path / "hub" / "models--some--repo" / "snapshots" / ("c" * 40) / "sub" / "a.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert check_file_by_key("hub") == path
    path.write_bytes(CONTENT[1:])
    with pytest.raises(DownloadError, match="bytes, expected"):
        check_file_by_key("hub")


def test_unknown_keys_name_the_known_ones():
    with pytest.raises(DownloadError, match=r"'sd15'.*ms_coco, v1-5-pruned-emaonly, prompts, hps_v2\.1"):
        check_file_by_key("sd15")


def test_the_registry_is_complete_and_says_what_is_promised(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    monkeypatch.delenv("HPS_ROOT", raising=False)
    assert set(ASSETS) == {
        *("ms_coco", "v1-5-pruned-emaonly", "prompts"),
        *("hps_v2.1", "hps_v2.0", "clip_l14", "aesthetic", "pickscore_v1", "imagereward", "bert_vocabulary", "mps"),
    }
    for key, asset in ASSETS.items():
        assert asset.key == key
        assert (asset.repo is None) != (asset.base_url is None)
        assert asset.repo is None or re.fullmatch("[0-9a-f]{40}", asset.revision)
        for file in asset.files:
            assert file.size is None or file.sha256 is not None
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.name in by_hand(key)
            # Nobody publishes a hash of HPSv2.0 or MPS.
            weights = file.name.endswith((".safetensors", ".pt", ".pth"))
            assert file.sha256 is not None or not weights or key in ("hps_v2.0", "mps")
        assert str(tmp_path) in by_hand(key)
        assert "\n" not in by_hand(key)
    assert ASSETS["hps_v2.1"].folders()[0] == ROOT / "weights"


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "big"
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        # Same size and time: the second content shows that only the note was consulted.
        assert stamped_sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_a_stamp_counts_for_this_file_at_this_time_only(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    os.utime(path, ns=(10**18, 10**18))
    os.utime(other, ns=(10**18, 10**18))
    hash_of = {data: hashlib.sha256(data).hexdigest() for data in (b"one", b"two", b"four")}
    assert stamped_sha256(path) == hash_of[b"one"]
    assert stamped_sha256(other) == hash_of[b"two"]
    path.write_bytes(b"two")
    assert stamped_sha256(path) == hash_of[b"two"]  # another mtime
    path.write_bytes(b"four")
    os.utime(path, ns=(10**18, 10**18))
    assert stamped_sha256(path) == hash_of[b"four"]  # another size
    for damage in (b"", b"{", b"\xff\xff", b"0" * 64):
        for note in (tmp_path / "cache" / "verified").iterdir():
            note.write_bytes(damage)
        assert stamped_sha256(other) == hash_of[b"two"]


def test_stamps_are_optional(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"one")
    assert stamped_sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    with pytest.raises(OSError):
        stamped_sha256(tmp_path / "missing")
