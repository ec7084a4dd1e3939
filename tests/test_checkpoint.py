"""Files after a failure, and checkpoints after deliberate damage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from torch_utils.checkpoint import (
    CheckpointError,
    atomic_file,
    atomic_write_bytes,
    atomic_write_text,
    load_checkpoint,
    lock_folder,
    record_path,
    save_checkpoint,
    sha256_file,
)
from torch_utils.errors import UserError, user_errors

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_file_puts_the_whole_content_in_place(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.bin"]


def test_atomic_write_text_keeps_line_ends_and_unicode(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "é\r\n\u2028\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n\u2028\n".encode()


def test_the_old_content_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("ne")
        assert temporary.parent == path.parent
        assert path.read_text() == "old"
        assert not list(tmp_path.glob("*.txt"))[1:]
    assert path.read_text() == "ne"


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_no_other(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(failure), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_failed_rename_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        atomic_write_bytes(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        atomic_write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_data_reach_the_disk_before_the_name(tmp_path):
    """Watches the calls, which still do their work: data flushed, renamed, folder flushed."""
    events = []

    def audit(name, function):
        def wrapper(*arguments):
            events.append(name if name != "fsync" else f"fsync:{os.readlink(f'/proc/self/fd/{arguments[0]}')}")
            return function(*arguments)

        return wrapper

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", audit("fsync", os.fsync))
        patch.setattr(os, "replace", audit("replace", os.replace))
        atomic_write_bytes(tmp_path / "a", b"x")
    assert len(events) == 3
    assert events[0].startswith(f"fsync:{tmp_path}/.")
    assert events[1:] == ["replace", f"fsync:{tmp_path}"]


def test_sha256_file_over_several_pieces(tmp_path):
    data = os.urandom((1 << 20) * 2 + 17)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def example_state() -> dict:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "policy": {"w": torch.randn(5, dtype=torch.float64), "h": torch.randn(2).bfloat16()},
        "optimizer": optimizer.state_dict(),
        "step": 12,
        "config": {"lr": 1e-4, "name": "é", "scales": (True, None)},
        "rng": torch.get_rng_state(),
    }


def test_checkpoint_round_trip_is_exact(tmp_path):
    state = example_state()
    path = tmp_path / "checkpoints" / "policy-step000012.pt"
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert loaded.pop("config") == state.pop("config")
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert names(path.parent) == ["policy-step000012.pt", "policy-step000012.pt.sha256"]


def test_record_is_readable_by_sha256sum(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    result = subprocess.run(["sha256sum", "-c", "a.pt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_kind_of_damage_is_one_line_naming_the_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, example_state())
    good, record = path.read_bytes(), record_path(path).read_text()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    damages = {
        "truncated": (good[:-100], record),
        "empty": (b"", record),
        "one bit": (bytes(flipped), record),
        "appended": (good + b"\0", record),
        "other record": (good, "0" * 64 + "  a.pt\n"),
        "empty record": (good, ""),
        "binary record": (good, b"\xff\xfe"),
        "no record": (good, None),
        "no file": (None, record),
    }
    for damage, (data, text) in damages.items():
        for target, content in ((path, data), (record_path(path), text)):
            target.unlink(missing_ok=True)
            if content is not None:
                target.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert "a.pt" in str(caught.value), damage
        assert "\n" not in str(caught.value), damage


def write_with_record(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    record_path(path).write_text(hashlib.sha256(data).hexdigest())


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_executed_even_when_the_hash_is_right(tmp_path):
    write_with_record(tmp_path / "a.pt", pickle.dumps({"x": Bomb(tmp_path / "boom")}))
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"x": Bomb(tmp_path / "boom")}, tmp_path / "b.pt")
    write_with_record(tmp_path / "b.pt", (tmp_path / "b.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"b\.pt"):
        load_checkpoint(tmp_path / "b.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"PK\x03\x04" + b"\0" * 50])
def test_rubbish_with_a_right_hash(tmp_path, data):
    write_with_record(tmp_path / "a.pt", data)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_crash_between_record_and_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    """The checkpoint is replaced, as policy-best.pt is, and the process dies before the new one has its name."""
    path, replace, renamed = tmp_path / "best.pt", os.replace, []
    save_checkpoint(path, {"step": 1})

    def dies(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        renamed.append(Path(target).name)
        replace(source, target)

    for step in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", dies)
            save_checkpoint(path, {"step": step})
        assert load_checkpoint(path) == {"step": 1}
    assert renamed == ["best.pt.sha256"] * 2
    save_checkpoint(path, {"step": 4})
    assert load_checkpoint(path) == {"step": 4} and record_path(path).read_text().count("\n") == 1


def test_a_checkpoint_is_a_dict(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    write_with_record(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes())
    with pytest.raises(CheckpointError, match="holds a list, not a dict"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [Path("x"), lambda: 0, Bomb(Path("/nonexistent"))], ids=["path", "lambda", "object"])
def test_what_could_not_be_read_back_is_not_saved(tmp_path, value):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        save_checkpoint(path, {"step": 2, "bad": value})
    assert load_checkpoint(path) == {"step": 1}
    assert names(tmp_path) == ["a.pt", "a.pt.sha256"]


def test_a_killed_writer_never_leaves_a_bad_checkpoint(tmp_path):
    """Kill a process that keeps saving new checkpoints: each one under its final name loads."""
    program = (
        "import itertools, sys, torch\n"
        "from torch_utils.checkpoint import save_checkpoint\n"
        "for step in itertools.count():\n"
        "    save_checkpoint(f'{sys.argv[1]}/{step}.pt', {'step': step, 'w': torch.full((50000,), float(step))})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for _ in range(10):
        process.stdout.readline()
    process.kill()
    process.communicate()
    checkpoints = list(tmp_path.glob("*.pt"))
    assert len(checkpoints) >= 10
    for path in checkpoints:
        step = load_checkpoint(path)["step"]
        assert path.name == f"{step}.pt"


def test_user_errors_end_a_command_with_one_line_and_code_2():
    @click.command()
    @click.argument("kind")
    @user_errors
    def command(kind):
        if kind == "user":
            raise CheckpointError("file a.pt\nis damaged")
        if kind == "bug":
            raise ValueError("a bug keeps its traceback")
        if kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "a.pt")
        if kind == "other":
            raise OSError(errno.EINVAL, "Invalid argument")
        if kind == "ascii":
            "ä".encode("ascii")
        click.echo("fine")

    result = CliRunner().invoke(command, ["user"])
    assert result.exit_code == 2
    assert result.stderr == "Error: file a.pt is damaged\n"
    assert isinstance(CliRunner().invoke(command, ["bug"]).exception, ValueError)
    assert CliRunner().invoke(command, ["none"]).stdout == "fine\n"
    full, other, ascii_only = (CliRunner().invoke(command, [kind]) for kind in ("full", "other", "ascii"))
    assert full.exit_code == ascii_only.exit_code == 2 and isinstance(other.exception, OSError)
    assert full.stderr.startswith("Error: a.pt: No space left on device; ") and full.stderr.count("\n") == 1
    assert ascii_only.stderr.endswith("cannot be written in ascii, the encoding of this locale: set PYTHONUTF8=1\n")
    assert issubclass(CheckpointError, UserError)
    assert issubclass(UserError, ValueError)


def test_a_folder_is_locked_for_one(tmp_path):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert lock_folder(tmp_path, first)
        assert not lock_folder(tmp_path, second)
        first.close()
        assert lock_folder(tmp_path, second)


def test_a_file_system_without_locks_is_not_taken_for_one_in_use(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with contextlib.ExitStack() as locks, pytest.raises(CheckpointError, match=r"cannot lock .*needs locks \(flock\)"):
        lock_folder(tmp_path, locks)
