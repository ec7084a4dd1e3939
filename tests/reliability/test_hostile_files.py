"""Hostile files: every reader refuses them or reads them, and does nothing else.

A reader refuses by a `UserError`; any other exception is a fault. So is a program that is run, code of the file that is
executed, a file that is opened or changed outside of the reader's folder, a file that takes a minute, and memory beyond
what the reader needs. `hostile_readers.READERS` lists the readers, `hostile_mutations` how good files are spoilt, and
`hostile_worker` runs them in processes of their own with a limit of memory.

EPD_FUZZ is the number of hostile files for each reader; without it there are 150, and fewer for the slow readers. The
full count on 16 cores, with pytest-xdist:

    EPD_FUZZ=10000 python -m pytest -n 16 tests/reliability/test_hostile_files.py

The files are the same every time, and a fault names the one that caused it, which `hostile_worker.py` can read again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import hostile_mutations as mutations
import pytest
import torch
from hostile_readers import READERS, ROOT, SEPARATOR
from PIL import Image

from torch_utils.checkpoint import CheckpointError, load_checkpoint, load_tensors, lock_folder
from torch_utils.errors import UserError, UserErrorExit, user_errors
from torch_utils.untrusted import check_tokenizer_config, read_model_config
from training.images import load_image
from training.manifest import Manifest
from training.ppo.scoring import ScoringError, collect_images

COUNT = int(os.environ.get("EPD_FUZZ", 150))
PART = 500  # files of a test
# Readers that build networks or configurations get this part of the default count.
SLOW = {"single file .safetensors": 10, "single file .ckpt": 10, "model folder": 10, "scorer folder": 10}
SLOW |= {"configuration": 3, "override": 3}
MOST_BYTES = 1 << 30  # that any file may take in memory; the largest bomb has 400 MB
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [*map(str, (ROOT, ROOT / "tests", Path(__file__).parent)), os.environ.get("PYTHONPATH", "")]
    ),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Worker:
    """The process that reads hostile files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.errors = open(folder / "stderr", "wb")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hostile_worker.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=ENVIRONMENT,
            cwd=ROOT,
            text=True,
        )

    def ask(self, **job: object) -> dict:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "stderr").read_text()[-2000:]
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    process = Worker(tmp_path_factory.mktemp("hostile"))
    yield process
    process.close()


@pytest.mark.reliability
@pytest.mark.timeout(300 + 5 * PART)
@pytest.mark.parametrize("part", range(-(-COUNT // PART)))
@pytest.mark.parametrize("name", READERS)
def test_hostile_files_are_refused_or_read(worker, name, part):
    count = min(PART, COUNT - part * PART)
    if "EPD_FUZZ" not in os.environ:
        count //= SLOW.get(name, 1)
    answer = worker.ask(reader=name, count=count, seed=part)
    assert not answer.get("error"), answer["error"]
    assert not answer["faults"], json.dumps(answer["faults"], indent=1)
    assert answer["inputs"] >= count
    assert set(answer["outcomes"]) <= {"refused", "read"} and answer["outcomes"]["refused"]
    assert answer["peak_bytes"] < MOST_BYTES
    print(name, *(answer[key] for key in ("inputs", "outcomes", "seconds", "peak_bytes")))


BAD_READER = """
import collections, os, pickle
import hostile_readers, hostile_worker, torch
from torch_utils.errors import UserError

def bad(path):
    match path.read_text():
        case "run": pickle.loads(b"cos\\nsystem\\n(X\\x0e\\x00\\x00\\x00touch executedtR.")
        case "read": open("../secret.png").close()
        case "read far": open("/etc/hostname").close()
        case "write": open("../other", "w").close()
        case "move": os.rename("x", "../other")
        case "eval": eval("1 + 1")
        case "ask for all":
            try: bytearray(1 << 40)
            except MemoryError as error: raise UserError("refused") from error
        case "raise": [][0]
        case "reserve": torch.empty(3 << 29, dtype=torch.uint8)
        case "take": b"x" * (3 << 29)
        case "innocent":
            collections.namedtuple("Pair", "a b")
            open("y", "w").close()

hostile_readers.READERS["bad"] = hostile_readers.Reader("x", lambda folder: [b"good"], bad)
hostile_worker.main()
"""
BAD = {"run": "os.system", "read": "open ", "read far": "open ", "write": "open ", "move": "os.rename", "eval": "exec "}
BAD |= {"ask for all": "UserError", "raise": "IndexError", "reserve": "", "take": "", "innocent": ""}


@pytest.mark.reliability
def test_the_worker_sees_what_it_is_for(tmp_path):
    """Each thing that a reader must not do is noticed, and only that."""
    for name in BAD:
        (tmp_path / name).write_text(name)
    (tmp_path / "work").mkdir()
    program = [sys.executable, "-c", BAD_READER, str(tmp_path / "work")]
    job = json.dumps({"reader": "bad", "files": [str(tmp_path / name) for name in BAD]}) + "\n"
    done = subprocess.run(program, input=job, capture_output=True, text=True, check=True, env=ENVIRONMENT, cwd=ROOT)
    answers = dict(zip(BAD, json.loads(done.stdout)["answers"].values(), strict=True))
    for name, answer in answers.items():
        assert bool(answer["faults"]) == bool(BAD[name]), (name, answer)
        assert any(BAD[name] in fault for fault in answer["faults"]) or not BAD[name], (name, answer)
        assert (answer["peak_bytes"] >= MOST_BYTES) == (name in ("take", "reserve")), (name, answer)
    assert "code of the file was run" in answers["run"]["faults"]


# --- Files that claim, or unfold to, far more than they are. ---


def archive(text: bytes, numbers: bytes = bytes(32), compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch archive around the pickle `text` with one storage."""
    members = {"a/data.pkl": text, "a/version": b"3\n", "a/byteorder": b"little", "a/data/0": numbers}
    return mutations.write_members(members, compression)


def tensor(size: tuple[int, ...], stride: tuple[int, ...], count: int, kind: str = "FloatStorage") -> bytes:
    """The opcodes of a tensor on the storage "0"."""
    number = mutations.number_opcode
    shapes = [b"(" + b"".join(map(number, shape)) + b"t" for shape in (size, stride)]
    storage = b"(" + mutations.text_opcode("storage") + f"ctorch\n{kind}\n".encode() + mutations.text_opcode("0")
    storage += mutations.text_opcode("cpu") + number(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return mutations.call_opcodes("torch._utils", "_rebuild_tensor_v2", storage, number(0), *shapes, b"\x89", hooks)


def state(value: bytes) -> bytes:
    """The pickle of `{"w": value}`."""
    return b"\x80\x02}" + mutations.text_opcode("w") + value + b"s."


def legacy(value: bytes, keys: bytes = pickle.dumps(["0"], 2)) -> bytes:
    """A file in torch's format before the archive, with 32 bytes of numbers."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    value = value.replace(b"tQ", b"NtQ")  # a storage says there of what other it is a view
    return b"".join([*head, state(value), keys, struct.pack("<q", 8), bytes(32)])


def call(module: str, name: str, number: int) -> bytes:
    return mutations.call_opcodes(module, name, mutations.number_opcode(number))


def safetensors_file(header: str, numbers: bytes = bytes(64)) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + numbers


def png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return mutations.join_png([(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")])


def gif(width: int, height: int) -> bytes:
    Image.new("P", (1, 1)).save(buffer := io.BytesIO(), "GIF")
    return b"GIF89a" + struct.pack("<HH", width, height) + buffer.getvalue()[10:]


def part(name: str, **changes: object) -> bytes:
    """A part of the model folder with other values."""
    text = (ROOT / "src" / "embedded" / name).read_text()
    return name.encode() + SEPARATOR + json.dumps(json.loads(text) | changes).encode()


def laughs() -> bytes:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9)]
    return "\n".join(lines).encode()


def doubled() -> bytes:
    """References to references, 40 at each of six levels."""
    keys = ["dataset_name", "guidance_type", "schedule_type", "model_path", "precision", "compile"]
    lines = [f"  {key}: '{f'${{model.{after}}}' * 40}'" for key, after in itertools.pairwise(keys)]
    return "\n".join(["model:", *lines, f"  compile: {'x' * 40}"]).encode()


def zipped(size: int) -> bytes:
    return archive(state(tensor((size // 4,), (1,), size // 4)), bytes(size), zipfile.ZIP_DEFLATED)


JSON_BOMBS = {
    "deep": lambda: b"[" * 1_000_000,
    "deep objects": lambda: b'{"a":' * 500_000 + b"1" + b"}" * 500_000,
    "a long number": lambda: b"9" * 1_000_000,
}
LINE_BOMBS = {
    name: lambda make=make: b'{"seed": 0, "prompt": "a", "file": ' + make() for name, make in JSON_BOMBS.items()
}
TORCH_BOMBS = {
    "compressed numbers": lambda: zipped(1 << 29),
    "a compressed pickle": lambda: archive(state(b"(" + b"N" * (1 << 27) + b"t"), compression=zipfile.ZIP_DEFLATED),
    "a tensor that grows its storage": lambda: archive(state(tensor((1 << 29,), (1,), 8))),
    "a tensor of strides 0": lambda: archive(state(tensor((1 << 40,), (0,), 8))),
    "a claimed storage": lambda: archive(state(tensor((1 << 29,), (1,), 1 << 29))),
    "a claimed storage of 2^60": lambda: archive(state(tensor((8,), (1,), 1 << 60))),
    "a byte array": lambda: archive(state(call("builtins", "bytearray", 1 << 31))),
    "a tensor by its class": lambda: archive(state(call("torch", "Tensor", 1 << 29))),
    "an untyped storage": lambda: archive(state(call("torch.storage", "UntypedStorage", 1 << 31))),
    "an old claimed storage": lambda: legacy(tensor((1 << 29,), (1,), 1 << 29)),
    "an old tensor that grows": lambda: legacy(tensor((1 << 29,), (1,), 8)),
    "an old byte array": lambda: legacy(call("builtins", "bytearray", 1 << 31)),
    "a storage among the old keys": lambda: legacy(
        tensor((8,), (1,), 8), b"\x80\x02](" + call("torch.storage", "UntypedStorage", 1 << 31) + b"e."
    ),
    "long text announced": lambda: archive(state(b"X\xff\xff\xff\xffabc")),
    "old long text announced": lambda: b"\x80\x02X\xff\xff\xff\xffabc",
}
SAFETENSORS_BOMBS = {
    "a header of 2^60 bytes": lambda: struct.pack("<Q", 1 << 60) + b"{}",
    "a header of 99 MB that is not there": lambda: struct.pack("<Q", 99_000_000) + b"{}",
    "a tensor of 2^60 numbers": lambda: safetensors_file(
        '{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,64]}}'
    ),
    "offsets of 2^60": lambda: safetensors_file(
        '{"a":{"dtype":"F64","shape":[8],"data_offsets":[0,1152921504606846976]}}'
    ),
    "overlapping tensors": lambda: safetensors_file(
        "{" + ",".join(f'"{i}":{{"dtype":"F64","shape":[8],"data_offsets":[0,64]}}' for i in range(10_000)) + "}"
    ),
    "a deep header": lambda: safetensors_file("[" * 100_000),
}
BOMBS = {
    "table .json": {
        **JSON_BOMBS,
        "empty rows": lambda: b'{"format": "epd-solver-table-1", "positions": [' + b"[]," * 5_000_000 + b"[]]}",
        "a deep configuration": lambda: (
            b'{"format":"epd-solver-table-1","positions":[[0.5]],"weights":[[1]],"backend_config":'
            + b'{"a":' * 450
            + b"1"
            + b"}" * 451
        ),
    },
    "table .safetensors": SAFETENSORS_BOMBS,
    "weights .safetensors": SAFETENSORS_BOMBS,
    "single file .safetensors": SAFETENSORS_BOMBS,
    "checkpoint": TORCH_BOMBS,
    "weights .pt": TORCH_BOMBS,
    "MPS": TORCH_BOMBS,
    "prompts .txt": {"many lines": lambda: b"a\n" * 50_000_000, "one line": lambda: b"a" * (100 << 20)},
    "prompts .csv": {
        "many lines": lambda: b"text\n" + b"a\r" * 50_000_000,
        "a long cell": lambda: b'text\n"' + b"a" * 9_000_000,
    },
    "configuration": {
        "aliases of aliases": laughs,
        "references of references": doubled,
        "a reference to nothing": lambda: b"model: {compile: '${run.nothing}'}",
        "a circle": lambda: b"run: {run_name: '${run.output_root}', output_root: '${run.run_name}'}",
        "deep": lambda: b"[" * 100_000,
        "deep in lines": lambda: b"\n".join(b" " * i + b"a:" for i in range(600)),
        "a long hexadecimal number": lambda: b"run: {seed: 0x" + b"f" * 100_000 + b"}",
        "a long key": lambda: b"x" * 250_000 + b": 1",
    },
    "image": {
        "900 million pixels": lambda: png(30_000, 30_000, bytes(30_001 * 100)),
        "60 million pixels that are there": lambda: png(8000, 7500, bytes(8001 * 7500)),
        "2^62 pixels": lambda: png(2**31 - 1, 2**31 - 1, b""),
        "a compressed text": lambda: png(
            2, 2, bytes(6), *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 9))] * 5
        ),
        "a compressed profile": lambda: png(2, 2, bytes(6), (b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20), 9))),
        "4 GB of pixels announced": lambda: png(8, 6, b"").partition(b"IDAT")[0][:-4] + b"\xff\xff\xff\xffIDATabc",
        "a short profile behind the pixels": lambda: png(2, 2, bytes(6)).replace(
            mutations.join_png([(b"IEND", b"")])[8:], mutations.join_png([(b"iCCP", b"abc\0"), (b"IEND", b"")])[8:]
        ),
        "pixels without end": lambda: png(2, 2, bytes(400 << 20)),
        "a GIF of 2^32 pixels": lambda: gif(65_535, 65_535),
    },
    "manifest to score": LINE_BOMBS,
    "manifest to continue": LINE_BOMBS,
    "score record": JSON_BOMBS,
    "model folder": {
        "wide": lambda: part("unet/config.json", block_out_channels=[40_000] * 3),
        "deep": lambda: part("unet/config.json", layers_per_block=10**6),
        "many levels": lambda: part("vae/config.json", block_out_channels=[8] * 100_000),
        "a wide text encoder": lambda: part("text_encoder/config.json", hidden_size=96_000),
        "a deep text encoder": lambda: part("text_encoder/config.json", num_hidden_layers=10**7),
        "long prompts": lambda: part("tokenizer/tokenizer_config.json", model_max_length=10**9),
        "prompts of no number": lambda: part("tokenizer/tokenizer_config.json", model_max_length=[9]),
        "prompts without end": lambda: part("tokenizer/tokenizer_config.json", model_max_length=10**30),
        "long noise": lambda: part("scheduler/scheduler_config.json", num_train_timesteps=10**10),
        "a long text": lambda: part("unet/config.json", sample_size="x" * 1000),
    },
}
SPARSE = ["table .json", "table .pkl", "table .safetensors", "checkpoint's record", "prompts .txt", "prompts .csv"]
SPARSE += ["configuration", "image", "manifest to score", "manifest to continue", "score record", "vocabulary"]


@pytest.mark.reliability
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_memory(worker, tmp_path, name):
    for title, make in BOMBS[name].items():
        (tmp_path / title).write_bytes(make())
    answers = worker.ask(reader=name, files=[str(tmp_path / title) for title in BOMBS[name]])
    assert not answers.get("error"), answers["error"]
    for file, answer in answers["answers"].items():
        assert not answer["faults"], (file, answer["faults"])
        assert answer["peak_bytes"] < MOST_BYTES, (file, answer["peak_bytes"] >> 20)
        assert answer["seconds"] < 60, (file, answer["seconds"])


@pytest.mark.reliability
@pytest.mark.parametrize("name", SPARSE)
def test_a_terabyte_of_zeros_is_not_read(worker, name):
    answer = worker.ask(reader=name, sparse=1 << 40)
    assert not answer.get("error"), answer["error"]
    assert not answer["faults"], answer["faults"]
    assert answer["peak_bytes"] < 2 * MOST_BYTES and answer["seconds"] < 60


CODE = ["_attn_implementation", "attn_implementation", "auto_map", "quantization_config", "transformers_weights"]


@pytest.mark.parametrize("key", CODE)
def test_a_configuration_cannot_name_code(tmp_path, key):
    """transformers would fetch a repository's kernels, import a library, or read other weights by these."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": {key: "owner/name"}}))
    with pytest.raises(ValueError, match=f"{key}' names code"):
        read_model_config(path)


def test_a_configuration_that_names_none_is_read(tmp_path):
    """Some versions of transformers save these."""
    content = {"_attn_implementation_autoset": True, "quantization_config": None, "text_config": {"use_kernels": False}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_model_config(tmp_path / "config.json") == content


def test_a_checkpoint_of_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "policy.pt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"policy\.pt has more than 17179869184 bytes"):
        load_checkpoint(tmp_path / "policy.pt")


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_a_tokenizer_cannot_name_files(tmp_path, key):
    """The tokenizers library opens them wherever they are, and Python does not see it."""
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({key: "/etc/passwd"}))
    with pytest.raises(ValueError, match=f"{key} of tokenizer_config.json names a file"):
        check_tokenizer_config(path)
    path.write_text(json.dumps({"model_max_length": 10**30, key: {"a": 0}}))
    check_tokenizer_config(path)


def test_an_error_does_not_steer_the_terminal():
    """A message may quote a file."""

    @user_errors
    def command():
        raise UserError("a\x1b[2J\nb\udc80é")

    with pytest.raises(UserErrorExit, match=r"^a\\x1b\[2J b\\udc80é$"):
        command()


# --- Names that lead elsewhere. ---


def image_folder(folder: Path, **changes: object) -> Path:
    (folder / "000000").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "000000" / "000000.png")
    row = {"file": "000000/000000.png", "seed": 0, "prompt": "a cat", "solver": "ddim"}
    lines = [row, {**row, "seed": 1, **changes}] if changes else [row]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


NAMES = ["../outside.png", "000000/../../outside.png", "../folder/000000/000000.png", "/etc/passwd", "//etc/passwd"]
NAMES += ["..", ".", "", "/", "000000", "000000/000000.png/x", "a\0b", "\udc80", "x" * 5000, "x/" * 3000, "~/x.png"]


@pytest.mark.parametrize("allow_missing", [False, True])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_no_image_from_elsewhere_is_listed(tmp_path, name, allow_missing):
    """What the manifest names and the folder does not have is missing, whether it exists elsewhere or not."""
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    folder = image_folder(tmp_path / "folder", file=name)
    found = None
    with contextlib.suppress(ScoringError):
        found = collect_images(folder, allow_missing=allow_missing)
    assert (found is not None) == (allow_missing and name != "\udc80")
    if found is not None:
        assert [entry.path for entry in found.entries] == [folder / "000000" / "000000.png"]


def test_an_absolute_name_is_not_listed(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    for name in (tmp_path / "outside.png", tmp_path / "folder" / "000000" / "000000.png"):
        folder = image_folder(tmp_path / "folder", file=str(name))
        with pytest.raises(ScoringError, match="1 of the 2 images"):
            collect_images(folder)
        (folder / "000000" / "000000.png").unlink()
        (folder / "000000").rmdir()


def test_nothing_is_written_through_a_link(tmp_path):
    """A folder from elsewhere may hold links under the names that are written; what they lead to stays as it is."""
    target, folder = tmp_path / "precious", image_folder(tmp_path / "folder")
    target.write_text("kept")
    for name in (".lock", "manifest-rank0.jsonl", "manifest.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    with contextlib.ExitStack() as locks, pytest.raises(CheckpointError, match=r"cannot write .*\.lock"):
        lock_folder(folder, locks)
    manifest = Manifest(folder, {"solver": "ddim"})
    with pytest.raises(OSError), manifest.writer(0) as add:
        add(0, "a cat")
    with contextlib.suppress(UserError):
        manifest.begin([0])
    with contextlib.suppress(UserError):
        manifest.join([])
    assert target.read_text() == "kept"


@pytest.mark.parametrize("pattern", ["../*.png", "/etc/*", "../**/*", "**/../../*.png", "", "**", "[", "\0"])
def test_a_pattern_does_not_lead_outside(tmp_path, pattern):
    """The pattern is the user's own; it must not lead out of the folder by mistake either."""
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    folder = image_folder(tmp_path / "folder")
    with contextlib.suppress(UserError):
        for entry in collect_images(folder, pattern).entries:
            assert entry.path.resolve().is_relative_to(folder.resolve())


# --- Pictures. ---


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000"])
def test_only_plain_pictures_are_opened(tmp_path, kind):
    """Pillow tells formats by their content: under .png it would hand an EPS program to Ghostscript."""
    try:
        Image.new("RGB", (8, 8)).save(tmp_path / "image.png", kind)
    except (OSError, KeyError):
        pytest.skip("this Pillow cannot write the format")
    with pytest.raises(UserError, match=r"cannot read image .*image\.png"):
        load_image(tmp_path / "image.png")


def test_sizes_that_are_usual_are_read(tmp_path):
    Image.new("RGB", (4096, 4096)).save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png").shape == (3, 4096, 4096)
    Image.new("L", (4096, 4097)).save(tmp_path / "larger.png")
    with pytest.raises(UserError, match=r"larger\.png is too large: 4096 x 4097"):
        load_image(tmp_path / "larger.png")


def test_mutations_are_the_same_every_time():
    """A fault can be made again from the seed alone."""
    for change, good in (
        (mutations.mutate_bytes, b"0123456789" * 9),
        (mutations.mutate_json, b'{"a": [1, {"b": null}], "c": "d"}'),
        (mutations.mutate_png, png(2, 2, bytes(6))),
        (mutations.mutate_safetensors, safetensors_file('{"a":{"dtype":"F64","shape":[8],"data_offsets":[0,64]}}')),
    ):
        first, second = ([change(good, random.Random(seed), [1, "x"]) for seed in range(50)] for _ in range(2))
        assert first == second and len(set(first)) > 20


def test_usual_checkpoints_pass(tmp_path):
    """The check before torch reads a file lets through what torch itself writes."""
    shared = torch.arange(12.0).view(3, 4)
    content = {
        **{"a": shared, "b": shared[1:, ::2], "c": shared.t(), "scalar": torch.tensor(3), "none": torch.zeros(0, 5)},
        **{str(kind): torch.ones(2, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.int8, torch.bool)},
        **{str(kind): torch.ones(2, dtype=kind) for kind in (torch.complex64, torch.uint16, torch.float8_e4m3fn)},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nested": {"list": [1, 2.5, None, True, "é", (1,)], 5: torch.float32, "size": torch.Size([2])},
        "rng": torch.get_rng_state(),
        "sub": torch.nn.Linear(2, 3).state_dict(),
        "big": 2**70,
    }
    for zipped_format in (True, False):
        kept = {k: v for k, v in content.items() if zipped_format or ("uint16" not in k and "float8" not in k)}
        torch.save(kept, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped_format)
        loaded = load_tensors(tmp_path / "x.pt", "a checkpoint")
        assert loaded.keys() == kept.keys() and torch.equal(loaded["b"], content["b"])
        assert loaded["nested"] == content["nested"] and torch.equal(loaded["sub"]["weight"], content["sub"]["weight"])
