"""Hostile and damaged .pkl tables: nothing runs, and nothing but `TableError` or a valid table comes out."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import types
from pathlib import Path

import pytest
import torch

from training.networks import EPD_predictor
from training.ppo.cold_start import cold_start_table
from training.table import SolverTable, TableError, load_table, save_table

CANARY = "canary"  # hostile files create this file in the working folder when they run


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def legacy(*pickles: bytes, numbers: bytes = b"") -> bytes:
    return b"".join(pickles) + numbers


MAGIC, VERSION = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}, 2)
BIG_ENDIAN = pickle.dumps({"protocol_version": 1001, "little_endian": False, "type_sizes": {"long": 4}}, 2)
KEYS = pickle.dumps(["0"], 2)
NUMBERS = struct.pack("<q20f", 20, *[0.25] * 20)


def storage(kind: bytes = b"torch\nFloatStorage\n", count: int = 20) -> bytes:
    text = b"\x80\x02(X\x07\x00\x00\x00storagec" + kind + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return text + b"J" + struct.pack("<i", count) + b"NtQ."


def storage_bytes(values=(0.25,) * 20) -> bytes:
    numbers = struct.pack(f"<q{len(values)}f", len(values), *values)
    return legacy(MAGIC, VERSION, SYSTEM, storage(count=len(values)), KEYS, numbers=numbers)


def parameter(payload=None, size=(10, 2), stride=(2, 1), offset=0) -> Call:
    storage = Call(torch.storage._load_from_bytes, storage_bytes() if payload is None else payload)
    hooks = collections.OrderedDict()
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)
    return Call(torch._utils._rebuild_parameter, tensor, True, hooks)


def published(state_changes=None, parameter_changes=None, protocol=4) -> bytes:
    """A snapshot in the published layout, put together here: positions sigmoid(-1), sigmoid(1), weights 1/2."""
    parameters = {
        "r_params": parameter(storage_bytes((-1.0, 1.0) * 10)),
        **{name: parameter() for name in ("scale_dir_params", "scale_time_params", "weight_s")},
        **(parameter_changes or {}),
    }
    hooks = collections.OrderedDict()
    state = {
        **{"training": True, "_parameters": parameters, "_buffers": {}, "_non_persistent_buffers_set": set()},
        **{"_forward_hooks": hooks, "_modules": {"sigmoid": torch.nn.Sigmoid(), "softmax": torch.nn.Softmax(dim=-1)}},
        **{"dataset_name": "ms_coco", "img_resolution": 1024, "num_steps": 11, "num_points": 2, "sampler_stu": "epd"},
        **{
            "guidance_type": "cfg",
            "guidance_rate": 7.5,
            "schedule_type": "discrete",
            "schedule_rho": 1.0,
            "afs": False,
        },
        **{"scale_dir": 0.0, "scale_time": 0.0, "max_order": 2, "predict_x0": False, "lower_order_final": True},
        **{
            "backend": "ldm",
            "backend_config": {"resolution": 1024},
            "_init_args": (),
            "_init_kwargs": {"num_steps": 11},
        },
        **(state_changes or {}),
    }
    source = f"open({CANARY!r}, 'w').close()\nclass EPD_predictor: pass\n"
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": "EPD_predictor", "state": state}
    # pickle looks a global up before it writes its name, so the name must exist for a moment.
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = lambda meta: meta
    module._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    module._reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        return pickle.dumps({"model": Call(module._reconstruct_persistent_obj, meta)}, protocol=protocol)
    finally:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before


def own(parameter_changes=None) -> bytes:
    """A snapshot in our layout, with some parameters replaced."""
    predictor = EPD_predictor.from_table(cold_start_table(11, 2))
    predictor.__dict__["_parameters"].update(parameter_changes or {})
    return pickle.dumps({"model": predictor}, protocol=4)


AUDITED: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if AUDITED is not None:
        AUDITED.append(event)


sys.addaudithook(_audit)  # cannot be removed; does nothing outside of load()
HARMLESS = {"open", "builtins.id"}


def load(data: bytes, tmp_path: Path) -> SolverTable:
    """Load `data` as a .pkl; whatever happens, nothing ran: no import, call, exec or unpickling was audited."""
    global AUDITED
    path = tmp_path / "table.pkl"
    path.write_bytes(data)
    AUDITED = events = []
    try:
        return load_table(path)
    except TableError as err:
        assert str(err).startswith(f"{path}: ") and "\n" not in str(err) and len(str(err)) < len(str(path)) + 300
        raise
    finally:
        AUDITED = None
        assert set(events) <= HARMLESS
        assert not (tmp_path / CANARY).exists()


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(own(), tmp_path)  # lazy imports of torch happen here, not under audit of the test


def test_published_layout_is_read_and_its_source_text_is_not_run(tmp_path):
    table = load(published(), tmp_path)
    assert table.positions[3].tolist() == pytest.approx([0.2689414213699951, 0.7310585786300049], abs=1e-15)
    assert table.weights[3].tolist() == [0.5, 0.5]
    assert (table.num_steps, table.img_resolution, table.backend_config) == (11, 1024, {"resolution": 1024})


def test_scales_of_the_published_layout(tmp_path):
    values = (0.0, 2.0) * 10
    table = load(published({"scale_dir": 0.2}, {"scale_dir_params": parameter(storage_bytes(values))}), tmp_path)
    # 2 sigmoid(1) 0.2 + 0.8, by hand
    assert table.scale_dir[0].tolist() == pytest.approx([1.0, 1.092423431452002], abs=1e-12)
    assert table.scale_time[0].tolist() == [1.0, 1.0] and table.scale_dir_range == 0.2


TOUCH = f"touch {CANARY}"
EVAL = f"open({CANARY!r}, 'w').close()"
CALLS = {
    "os.system": Call(os.system, TOUCH),
    "eval": Call(eval, EVAL),
    "exec": Call(exec, EVAL),
    "getattr": Call(getattr, "x", "upper"),
    "open": Call(open, CANARY, "w"),
    "bytearray": Call(bytearray, 1 << 40),
    "torch.load": Call(torch.load, CANARY),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_calls_are_refused_by_name(tmp_path, name, protocol):
    for data in (
        pickle.dumps(CALLS[name], protocol),
        pickle.dumps({"model": CALLS[name]}, protocol),
        published({"guidance_rate": CALLS[name]}, protocol=max(protocol, 4)),
        published(parameter_changes={"r_params": CALLS[name]}),
        own({"weight_s": CALLS[name]}),
    ):
        with pytest.raises(TableError, match=r"asks for|opcode") as caught:
            load(data, tmp_path)
        if "asks for" in str(caught.value):
            assert name.split(".")[-1] in str(caught.value)


def test_the_hostile_calls_would_have_run(tmp_path):
    """Guards the canary itself: a plain pickle.loads does run such a file."""
    pickle.loads(pickle.dumps(CALLS["os.system"]))
    assert (tmp_path / CANARY).exists()
    (tmp_path / CANARY).unlink()
    with pytest.raises(Exception):  # noqa: B017 - torch stumbles later, when the harm is done
        pickle.loads(pickle.dumps(Call(torch.storage._load_from_bytes, pickle.dumps(CALLS["eval"], 2))))
    assert (tmp_path / CANARY).exists()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_hand_made_inner_stream_is_good():
    torch.testing.assert_close(torch.storage._load_from_bytes(storage_bytes()).tolist(), [0.25] * 20)


def zip_format() -> bytes:
    torch.save(torch.zeros(10, 2), buffer := io.BytesIO())
    return buffer.getvalue()


INNER = {
    "call first": pickle.dumps(CALLS["os.system"], 2),
    "call as system info": legacy(MAGIC, VERSION, pickle.dumps(CALLS["eval"], 2), storage(), KEYS, numbers=NUMBERS),
    "call as keys": legacy(MAGIC, VERSION, SYSTEM, storage(), pickle.dumps(CALLS["exec"], 2), numbers=NUMBERS),
    "call as storage type": legacy(MAGIC, VERSION, SYSTEM, storage(b"os\nsystem\n"), KEYS, numbers=NUMBERS),
    "a stream in the stream": pickle.dumps(Call(torch.storage._load_from_bytes, storage_bytes()), 2),
    "another type": legacy(MAGIC, VERSION, SYSTEM, storage(b"torch\nDoubleStorage\n"), KEYS, numbers=NUMBERS),
    "big endian": legacy(MAGIC, VERSION, BIG_ENDIAN, storage(), KEYS, numbers=NUMBERS),
    "another magic": legacy(VERSION, VERSION, SYSTEM, storage(), KEYS, numbers=NUMBERS),
    "another key": legacy(MAGIC, VERSION, SYSTEM, storage(), pickle.dumps(["1"], 2), numbers=NUMBERS),
    "two keys": legacy(MAGIC, VERSION, SYSTEM, storage(), pickle.dumps(["0", "1"], 2), numbers=NUMBERS),
    "count too high": legacy(MAGIC, VERSION, SYSTEM, storage(count=2**31 - 1), KEYS, numbers=NUMBERS),
    "count negative": legacy(MAGIC, VERSION, SYSTEM, storage(count=-2), KEYS, numbers=b""),
    "two counts": legacy(MAGIC, VERSION, SYSTEM, storage(), KEYS, numbers=struct.pack("<q20f", 19, *[0.25] * 20)),
    "short": legacy(MAGIC, VERSION, SYSTEM, storage(), KEYS, numbers=NUMBERS[:-1]),
    "long": legacy(MAGIC, VERSION, SYSTEM, storage(), KEYS, numbers=NUMBERS + b"\0"),
    "nan": legacy(MAGIC, VERSION, SYSTEM, storage(), KEYS, numbers=struct.pack("<q20f", 20, *[float("nan")] * 20)),
    "zip": zip_format(),
    "zip magic": b"PK\x03\x04" + b"\0" * 100,
    "tar": b"storages\0" * 100,
    "empty": b"",
}


@pytest.mark.parametrize("name", sorted(INNER))
def test_inner_streams_are_restricted_too(tmp_path, name):
    for data in (
        published(parameter_changes={"weight_s": parameter(INNER[name])}),
        own({"r_params": parameter(INNER[name])}),
    ):
        with pytest.raises(TableError):
            load(data, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"size": (5, 2)},
        {"size": (20,)},
        {"size": (-10, -2)},
        {"size": (10, 2, 1)},
        {"size": (1 << 62, 1 << 62)},
        {"size": (2, 10), "stride": (1, 2)},
        {"stride": (0, 0)},
        {"stride": (1, 10)},
        {"offset": 1},
        {"offset": -1},
        {"size": "ab"},
        {"size": {}},
        {"payload": "text"},
        {"payload": 7},
    ],
)
def test_hostile_tensor_shapes(tmp_path, change):
    with pytest.raises(TableError):
        load(published(parameter_changes={"r_params": parameter(**change)}), tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {"_parameters": None},
        {"_parameters": {}},
        {"_parameters": []},
        {"num_steps": 12},
        {"num_points": "2"},
        {"guidance_rate": None},
        {"guidance_rate": float("inf")},
        {"scale_dir": -1.0},
        {"scale_dir": "x"},
        {"schedule_type": 5},
        {"schedule_type": ["a"]},
        {"backend_config": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}},
        {"backend_config": {"a": torch.nn.Sigmoid()}},
        {"backend_config": {"a": float("nan")}},
        {"backend_config": {1: 2}},
        {"dataset_name": "x\ny"},
        {"dataset_name": "\ud800"},
        {"dataset_name": "x" * 100_000},
        {"sampler_stu": "os.system\n"},
        {"M": 2**200},
        {"an attribute\n": ()},
    ],
)
def test_hostile_attributes(tmp_path, state):
    with pytest.raises(TableError):
        load(published(state), tmp_path)


def test_attributes_cannot_replace_methods(tmp_path):
    state = {
        "to_table": "x",
        "forward": 1,
        "__class__": "y",
        "__setattr__": "z",
        "sigmoid": "s",
        "__reduce__": 1,
        "r_params": 3,
    }
    assert load(published(state), tmp_path).sha256() == load(published(), tmp_path).sha256()


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


OUTER = {
    "empty": b"",
    "a zip": b"PK\x03\x04",
    "text": b"hello",
    "persistent id": b"\x80\x04" + text(b"id") + b"Q.",
    "persistent id in text": b"\x80\x04Pid\n.",
    "persistent id in a good file": published().replace(b"\x88", b"Nq\0Q", 1),
    "extension registry": b"\x80\x04\x82\x01.",
    "instance": b"(S'touch canary'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nX\x0c\x00\x00\x00touch canaryo.",
    "newobj_ex": b"\x80\x04cos\nsystem\n)}\x92.",
    "dup": b"\x80\x04]2\x86.",
    "no stop": b"\x80\x04}",
    "stop only": b".",
    "pop below a mark": b"\x80\x04}(\x85.",
    "build on nothing": b"\x80\x04b.",
    "build on a dict": b"\x80\x04}}b.",
    "reduce of text": b"\x80\x04" + text(b"x") + b")R.",
    "set items on a list": b"\x80\x04](" + text(b"k") + b"Nu.",
    "odd items": b"\x80\x04}(" + text(b"k") + b"u.",
    "list as a key": b"\x80\x04}(]Nu.",
    "memo hole": b"\x80\x04h\x07.",
    "memo hole far": b"\x80\x04j\xff\xff\xff\xff.",
    "top is a list": b"\x80\x04].",
    "model is missing": b"\x80\x04}.",
    "model is text": b"\x80\x04}" + text(b"model") + text(b"x") + b"s.",
    "contains itself": b"\x80\x04}\x94" + text(b"model") + b"h\0s.",
    "left over": b"\x80\x04N}.",
    "4 GB of bytes announced": b"\x80\x04B\xff\xff\xff\xffabc.",
    "4 GB of text announced": b"\x80\x04X\xff\xff\xff\xffabc.",
    "bad utf-8": b"\x80\x04X\x02\x00\x00\x00\xff\xff.",
    "frame beyond the end": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "binbytes8": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "global with a line break": b"\x80\x04" + text(b"os\nimport") + text(b"system") + b"\x93.",
    "trailing byte": published() + b"\0",
    "two pickles": published() + published(),
    "bare predictor": pickle.dumps(EPD_predictor.from_table(cold_start_table(3, 2))),
    "deep tuples": b"\x80\x04)" + b"\x85" * 9_000 + b".",
    "deeper tuples": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
    "deep lists": b"\x80\x04" + b"]" * 9_000 + b".",
    "deep marks": b"\x80\x04" + b"(" * 9_000 + b".",
}


@pytest.mark.parametrize("name", sorted(OUTER))
def test_bad_outer_streams(tmp_path, name):
    with pytest.raises(TableError):
        load(OUTER[name], tmp_path)


def test_deep_nesting_inside_a_good_file(tmp_path):
    deep: list = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(TableError, match=r"backend_config.*nested"):
        load(published({"backend_config": {"a": deep}}), tmp_path)
    call = ()
    for _ in range(200):
        call = Call(torch.nn.Sigmoid, call)
    with pytest.raises(TableError):
        load(published({"guidance_rate": call}), tmp_path)
    assert load(published({"_unused": call, "_deep": deep}), tmp_path).num_steps == 11


def test_shared_parts_do_not_unfold(tmp_path):
    bomb: list = ["x" * 1000] * 100
    for _ in range(6):  # within the depth limit, 100^7 items when unfolded
        bomb = [bomb] * 100
    started = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(TableError, match="too large"):
        load(published({"backend_config": {"a": bomb}}), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20 and time.perf_counter() - started < 5


@pytest.mark.parametrize("size", [5 << 20, 200 << 20])
def test_huge_files_are_refused_unread(tmp_path, size):
    with open(tmp_path / "big.pkl", "wb") as file:
        file.write(b"\x80\x04")
        file.truncate(size)
    tracemalloc.start()
    with pytest.raises(TableError, match="far more than a table needs"):
        load_table(tmp_path / "big.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("make", [published, own])
def test_every_truncation_is_an_error(tmp_path, make):
    data = make()
    for length in range(0, len(data), 23):
        with pytest.raises(TableError):
            load(data[:length], tmp_path)


@pytest.mark.parametrize("make", [published, own])
def test_mutated_files_are_errors_or_valid_tables(tmp_path, make):
    rng = random.Random(20_251_122)
    good, outcomes = make(), collections.Counter()
    hostile = [b"cos\nsystem\n", b"R", b"b", b"Q", b"(", b"u", b"0", b"\x81", b"\x93", b"h\0", b"\x94", b"2"]
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place] = rng.randrange(256)
                case 2:
                    data[place:place] = rng.choice(hostile)
                case 3:
                    del data[place : place + rng.randint(1, 8)]
        try:
            table = load(bytes(data), tmp_path)
        except TableError:
            outcomes["refused"] += 1
        else:
            outcomes["valid"] += 1
            save_table(table, tmp_path / "again.json")
    assert outcomes["refused"] > 100 and outcomes["valid"] > 10  # both kinds did occur
