"""SolverTable: validation, the three file formats, the module form, the published files, the cold start."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.networks import EPD_predictor
from training.ppo.cold_start import cold_start_table, start_positions
from training.table import SolverTable, TableError, load_table, save_table

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "published_predictors"
ARRAYS = ("positions", "weights", "scale_dir", "scale_time")


def random_table(seed: int, rows: int, points: int, scales: bool = True, **metadata) -> SolverTable:
    rng = torch.Generator().manual_seed(seed)
    segments = torch.rand(rows, points + 1, generator=rng, dtype=torch.float64) + 0.01
    weights = torch.rand(rows, points, generator=rng, dtype=torch.float64) + 0.01
    c, a = 0.9 + 0.2 * torch.rand(2, rows, points, generator=rng, dtype=torch.float64) if scales else (None, None)
    return SolverTable(
        (segments / segments.sum(-1, keepdim=True)).cumsum(-1)[:, :-1],
        weights / weights.sum(-1, keepdim=True),
        c,
        a,
        **metadata,
    )


def bits(tensor: torch.Tensor) -> bytes:
    return struct.pack(f"<{tensor.numel()}d", *tensor.flatten().tolist())


# --- The value. ---


def test_absent_scales_are_ones_and_arrays_are_own_float64_copies():
    positions = torch.tensor([[0.25, 0.75]], dtype=torch.float32)
    table = SolverTable(positions, [[0.5, 0.5]])
    positions[0, 0] = 9.0
    assert table.positions.tolist() == [[0.25, 0.75]]
    assert table.scale_dir.tolist() == table.scale_time.tolist() == [[1.0, 1.0]]
    assert {getattr(table, name).dtype for name in ARRAYS} == {torch.float64}
    assert (table.num_steps, table.num_points) == (2, 2)
    assert (table.dataset_name, table.guidance_rate, table.schedule_type, table.schedule_rho) == (
        "ms_coco",
        7.5,
        "discrete",
        1.0,
    )
    with pytest.raises(FrozenInstanceError):
        table.afs = True


def test_sample_axis():
    table = SolverTable(torch.tensor([0.2, 0.6]).expand(5, 3, 2), torch.full((5, 3, 2), 0.5))
    assert table.is_batched and (table.num_steps, table.num_points) == (4, 2)
    with pytest.raises(TableError, match="5"):
        EPD_predictor.from_table(table)


GOOD = {"positions": [[0.2, 0.6], [0.1, 0.9]], "weights": [[0.5, 0.5], [0.3, 0.7]]}
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": [[0.2, 0.6], [0.6, 0.6]]}, ["positions[1]", "0.6, 0.6"]),
        ({"positions": [[0.2, 0.6], [0.9, 0.1]]}, ["positions[1]"]),
        ({"positions": [[0.0, 0.6], [0.1, 0.9]]}, ["positions[0]"]),
        ({"positions": [[0.2, 0.6], [0.1, 1.0]]}, ["positions[1]"]),
        ({"positions": [[0.2, NAN], [0.1, 0.9]]}, ["positions", "finite"]),
        ({"positions": [0.2, 0.6]}, ["positions", "shape"]),
        ({"positions": [[0.2, 0.6], [0.1]]}, ["positions"]),
        ({"positions": []}, ["positions"]),
        ({"positions": None}, ["positions"]),
        ({"positions": "abc"}, ["positions"]),
        ({"weights": [[0.5, 0.5], [0.0, 1.0]]}, ["weights[1]", "positive"]),
        ({"weights": [[0.5, 0.5], [-0.1, 1.1]]}, ["weights[1]", "positive"]),
        ({"weights": [[0.5, 0.50002], [0.3, 0.7]]}, ["weights[0]", "sum"]),
        ({"weights": [[1.0], [1.0]]}, ["weights", "shape"]),
        ({"scale_dir": [[1.0, 0.0], [1.0, 1.0]]}, ["scale_dir[0]", "positive"]),
        ({"scale_time": [[1.0, 1.0], [math.inf, 1.0]]}, ["scale_time", "finite"]),
        ({"num_steps": 11}, ["num_steps 11"]),
        ({"num_points": 3}, ["num_points 3"]),
        ({"num_steps": 3.0}, ["num_steps", "int"]),
        ({"guidance_rate": "7.5"}, ["guidance_rate", "float", "str"]),
        ({"guidance_rate": -1.0}, ["guidance_rate", "-1"]),
        ({"guidance_rate": None}, ["guidance_rate"]),
        ({"guidance_rate": NAN}, ["guidance_rate", "finite"]),
        ({"guidance_rate": 10**400}, ["guidance_rate", "finite"]),
        ({"afs": 1}, ["afs", "bool"]),
        ({"schedule_rho": 0}, ["schedule_rho"]),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, ["sigma_max"]),
        ({"dataset_name": "a\nb"}, ["dataset_name"]),
        ({"sampler_stu": "euler"}, ["euler", "epd, ipndm, dpmpp"]),
        ({"sampler_stu": "ipndm", "max_order": 5}, ["max_order is 5; ipndm has orders 1 to 4"]),
        ({"sampler_stu": "dpmpp", "max_order": 4}, ["max_order is 4; dpmpp has orders 1 to 3"]),
        ({"sampler_stu": "dpmpp", "max_order": 0}, ["max_order is 0"]),
        ({"backend_config": {"x": NAN}}, ["backend_config"]),
        ({"backend_config": {1: 2}}, ["backend_config"]),
        ({"backend_config": [1]}, ["backend_config"]),
    ],
)
def test_bad_values_are_one_line_errors(change, words):
    with pytest.raises(TableError) as caught:
        SolverTable(**{**GOOD, **change})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_rows_may_miss_one_by_rounding_only():
    SolverTable([[0.2, 0.6]], [[0.5, 0.500009]])
    with pytest.raises(TableError):
        SolverTable([[0.2, 0.6]], [[0.5, 0.500011]])


def test_sha256_sees_every_bit_and_every_metadata_field():
    table = random_table(0, 4, 3)
    hashes = {table.sha256()}
    for name in ARRAYS:
        nudged = getattr(table, name).clone()
        nudged[2, 1] = torch.nextafter(nudged[2, 1], torch.tensor(2.0, dtype=torch.float64))
        hashes.add(replace(table, **{name: nudged}).sha256())
    hashes.add(replace(table, guidance_rate=7.25).sha256())
    hashes.add(replace(table, backend_config={"a": 1}).sha256())
    hashes.add(replace(table, sigma_min=0.1).sha256())
    assert len(hashes) == 8
    assert replace(table, guidance_rate=8).sha256() == replace(table, guidance_rate=8.0).sha256()


def test_sha256_is_fixed():
    table = SolverTable([[0.25, 0.75]], [[0.5, 0.5]])
    text = (
        '{"M":1,"afs":false,"alpha":10.0,"backend":"ldm","backend_config":{},"dataset_name":"ms_coco","fcn":false,'
        '"flowmatch_mu":null,"flowmatch_shift":null,"guidance_rate":7.5,"guidance_type":"cfg","img_resolution":null,'
        '"lower_order_final":true,"max_order":2,"num_points":2,"num_steps":2,"positions":[[0.25,0.75]],"predict_x0":false,'
        '"sampler_stu":"epd","sampler_tea":"dpm","scale_dir":[[1.0,1.0]],"scale_dir_range":0.0,"scale_time":[[1.0,1.0]],'
        '"scale_time_range":0.0,"schedule_rho":1.0,"schedule_type":"discrete","sigma_max":null,"sigma_min":null,'
        '"weights":[[0.5,0.5]]}'
    )
    assert table.sha256() == hashlib.sha256(text.encode()).hexdigest()


# --- Files. ---

METADATA = {
    "dataset_name": "emoji",
    "guidance_rate": 3.3,
    "schedule_type": "time_uniform",
    "schedule_rho": 1.7,
    "sigma_min": 0.1 + 0.2,
    "sigma_max": 14.6,
    "afs": True,
    "backend_config": {"b": [1, 2.5, None], "a": {"c": "ü"}},
    "img_resolution": 64,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), points=st.integers(1, 5))
def test_lossless_formats_keep_every_bit(tmp_path_factory, suffix, seed, rows, points):
    path = tmp_path_factory.mktemp("t") / f"table{suffix}"
    table = random_table(seed, rows, points, **METADATA)
    save_table(table, path)
    again = load_table(path)
    for name in ARRAYS:
        assert bits(getattr(again, name)) == bits(getattr(table, name))
    assert again.metadata() == table.metadata()
    assert again.sha256() == table.sha256()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 12), points=st.integers(1, 5), half=st.sampled_from([0.0, 0.2, 1.0])
)
def test_pkl_is_exact_to_1e_6(tmp_path_factory, seed, rows, points, half):
    path = tmp_path_factory.mktemp("t") / "table.pkl"
    table = random_table(seed, rows, points, scale_dir_range=half, **METADATA)
    save_table(table, path)
    again = load_table(path)
    for name in ARRAYS:
        torch.testing.assert_close(getattr(again, name), getattr(table, name), rtol=0, atol=1e-6)
    assert again.scale_dir_range == (half or 1.0) and again.scale_time_range == 1.0
    assert {**again.metadata(), "scale_dir_range": half, "scale_time_range": 0.0} == table.metadata()


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors", ".json"])
@pytest.mark.parametrize(
    "metadata",
    [
        {"sampler_stu": "ipndm", "max_order": 4},
        {"sampler_stu": "dpmpp", "max_order": 3, "lower_order_final": False},
        {"sampler_stu": "dpmpp", "max_order": None},
        {"sampler_stu": "epd", "max_order": 7},  # says nothing to epd
        {"flowmatch_shift": 3.0, "flowmatch_mu": 1.15},
    ],
    ids=str,
)
def test_solver_and_time_shift_survive_every_format(tmp_path, suffix, metadata):
    table = random_table(4, 3, 2, scales=False, **metadata)
    save_table(table, tmp_path / f"t{suffix}")
    assert load_table(tmp_path / f"t{suffix}").metadata() == table.metadata()


def test_an_order_that_the_solver_lacks_is_refused_at_load(tmp_path):
    save_table(random_table(4, 3, 2, sampler_stu="epd", max_order=4), tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    (tmp_path / "t.json").write_text(text.replace('"sampler_stu": "epd"', '"sampler_stu": "dpmpp"'))
    with pytest.raises(TableError, match=r"t\.json: max_order is 4; dpmpp has orders 1 to 3$"):
        load_table(tmp_path / "t.json")


def test_pkl_without_scales_says_so(tmp_path):
    save_table(random_table(3, 5, 2, scales=False), tmp_path / "t.pkl")
    again = load_table(tmp_path / "t.pkl")
    assert again.scale_dir_range == again.scale_time_range == 0.0
    assert bool((again.scale_dir == 1).all())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scale_dir": [[1.0, 2.5]]}, "scale_dir 2.5"),  # beyond 1 +- 1
        ({"scale_time": [[1.0, 1.21]], "scale_time_range": 0.2}, "scale_time 1.21"),
        ({"scale_time": [[0.79, 1.0]], "scale_time_range": 0.2}, "scale_time 0.79"),
        ({"positions": [[0.9, 0.9 + 1e-9]]}, "positions"),  # one float32 logit for both
        ({"weights": [[0.5, 0.500008]]}, "weights"),  # softmax would normalise by more than 1e-6
    ],
)
def test_what_a_pkl_cannot_hold_is_an_error_and_writes_nothing(tmp_path, change, word):
    table = SolverTable(**{"positions": [[0.2, 0.6]], "weights": [[0.5, 0.5]], **change})
    with pytest.raises(TableError) as caught:
        save_table(table, tmp_path / "t.pkl")
    assert word in str(caught.value) and "t.pkl" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    save_table(table, tmp_path / "t.json")  # the lossless formats have no such limit
    assert load_table(tmp_path / "t.json").sha256() == table.sha256()


@pytest.mark.parametrize("name", ["t.pkl", "t.json", "t.safetensors"])
def test_a_sample_axis_cannot_be_saved(tmp_path, name):
    table = SolverTable(torch.tensor([0.2, 0.6]).expand(5, 3, 2), torch.full((5, 3, 2), 0.5))
    with pytest.raises(TableError, match=name):
        save_table(table, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_a_file_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "t.JSON"
    save_table(random_table(1, 2, 2), path)
    save_table(random_table(2, 2, 2), path)
    assert load_table(path).sha256() == random_table(2, 2, 2).sha256()
    assert [entry.name for entry in path.parent.iterdir()] == ["t.JSON"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(TableError, match="file"):
        save_table(random_table(1, 2, 2), tmp_path / "file" / "t.json")


def json_table(**change) -> bytes:
    return json.dumps({"format": "epd-solver-table-1", **GOOD, **change}).encode()


TENSORS = {name: torch.tensor(GOOD.get(name, [[1.0, 1.0], [1.0, 1.0]]), dtype=torch.float64) for name in ARRAYS}
HEADER = {"table": '{"format": "epd-solver-table-1"}'}


def without_metadata(data: bytes) -> bytes:
    """A .safetensors file whose header says null where text would be."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(data[8 : 8 + length])}).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("t.json", b"", "JSON"),
        ("t.json", b"\xff\xfe", "JSON"),
        ("t.json", b"[1]", "format"),
        ("t.json", b"[" * 100_000, "JSON"),
        ("t.json", json.dumps(GOOD).encode(), "format"),
        ("t.json", json_table(typo=1), "typo"),
        ("t.json", json_table(num_steps=4), "num_steps 4"),
        ("t.json", json_table(weights=None), "weights"),
        ("t.json", json_table(positions={"a": 1}), "positions"),
        ("t.json", json_table(guidance_rate=NAN), "guidance_rate"),
        ("t.json", b'{"format": "epd-solver-table-1", "positions": [[0.5]]}', "weights is missing"),
        ("t.safetensors", b"", "safetensors"),
        ("t.safetensors", b"\xff" * 100, "safetensors"),
        ("t.safetensors", safetensors.torch.save(TENSORS), "format"),
        ("t.safetensors", without_metadata(safetensors.torch.save(TENSORS)), "format"),
        ("t.safetensors", safetensors.torch.save(TENSORS, HEADER)[:-1], "safetensors"),
        ("t.safetensors", safetensors.torch.save({k: v.float() for k, v in TENSORS.items()}, HEADER), "float64"),
        ("t.safetensors", safetensors.torch.save({k: v[:0] for k, v in TENSORS.items()}, HEADER), "positions"),
        ("t.safetensors", safetensors.torch.save({**TENSORS, "x": TENSORS["weights"].clone()}, HEADER), "tensors"),
        ("t.pt", b"x", "unknown table format '.pt'"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, name, data, word):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TableError) as caught:
        load_table(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hand_made_files_above_are_good_but_for_their_fault(tmp_path):
    (tmp_path / "t.json").write_bytes(json_table())
    (tmp_path / "t.safetensors").write_bytes(safetensors.torch.save(TENSORS, HEADER))
    assert load_table(tmp_path / "t.json").sha256() == load_table(tmp_path / "t.safetensors").sha256()


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")
    for path in (tmp_path / "none.pkl", tmp_path / "pipe.pkl", "a\0b.pkl"):
        with pytest.raises(TableError, match="no such file"):
            load_table(path)
    (tmp_path / "dir.pkl").mkdir()
    for path in (tmp_path / "dir.pkl", tmp_path):
        with pytest.raises(TableError, match="this is a folder"):
            load_table(path)


# --- The module form. ---


def test_forward_matches_the_formulas():
    table = random_table(5, 4, 3, scale_dir_range=0.2)
    positions, scale_dir, scale_time, weights = EPD_predictor.from_table(table)(7, 2)
    assert positions.shape == (7, 3)
    for got, name in (
        (positions, "positions"),
        (scale_dir, "scale_dir"),
        (scale_time, "scale_time"),
        (weights, "weights"),
    ):
        torch.testing.assert_close(got, getattr(table, name)[2].float().expand(7, 3), rtol=0, atol=1e-6)


REFERENCE = '''
import pickle, sys, types, torch

class EPD_predictor(torch.nn.Module):
    """Independent of ours: what a published class can do with an instance that it did not initialise."""
    def values(self, batch, i):
        out = [self.sigmoid(self.r_params[i].repeat(batch, 1))]
        for params, s in ((self.scale_dir_params, self.scale_dir), (self.scale_time_params, self.scale_time)):
            if s:
                out.append(2 * self.sigmoid(0.5 * params[i].repeat(batch, 1)) * s + (1 - s))
        return out + [self.softmax(self.weight_s[i].repeat(batch, 1))]

EPD_predictor.__module__ = "training.networks"
for name in ("training", "training.networks"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["training.networks"].EPD_predictor = EPD_predictor
with open(sys.argv[1], "rb") as f:
    p = pickle.load(f)["model"].to("cpu")
names = ("sampler_stu num_steps num_points guidance_type guidance_rate afs max_order predict_x0 lower_order_final "
         "schedule_type schedule_rho dataset_name fcn backend backend_config").split()
import hashlib
import json
print(json.dumps([[v.tolist() for v in p.values(1, 3)], {n: getattr(p, n) for n in names}, p.training]))
'''


def test_a_foreign_predictor_class_opens_our_pkl(tmp_path):
    table = random_table(8, 5, 2, scale_dir_range=0.2, **METADATA)
    save_table(table, tmp_path / "t.pkl")
    run = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(tmp_path / "t.pkl")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    values, attributes, training = json.loads(run.stdout)
    for got, name in zip(values, ("positions", "scale_dir", "scale_time", "weights"), strict=True):
        assert got[0] == pytest.approx(getattr(table, name)[3].tolist(), abs=1e-6)
    assert attributes == {name: table.metadata()[name] for name in attributes}
    assert attributes["num_steps"] == 6 and training is False


def test_plain_pickle_load_gives_our_module_without_source_text(tmp_path):
    table = random_table(9, 5, 2, **METADATA)
    save_table(table, tmp_path / "t.pkl")
    data = (tmp_path / "t.pkl").read_bytes()
    predictor = pickle.loads(data)["model"]
    assert type(predictor) is EPD_predictor and predictor.r_params.dtype == torch.float32
    again = predictor.to_table()
    for name in ARRAYS:
        torch.testing.assert_close(getattr(again, name), getattr(table, name), rtol=0, atol=1e-6)
    assert again.sha256() == load_table(tmp_path / "t.pkl").sha256()
    assert not any(word in data for word in (b"import", b"def ", b"module_src", b"class "))


# --- The published files. ---

EXPECTED = {  # positions and weights of the first and last row, from an independent reading; guidance, schedule, pixels
    "sd15-best": ((0.1527, 0.6174), (0.2692, 0.5522), (0.8919, 0.9160), 7.5, "discrete", 1024, "ldm"),
    "sd15-distilled": ((0.2687, 0.5935), (0.2638, 0.6662), (0.5025, 0.6917), 7.5, "discrete", 1024, "ldm"),
    "sd15-start": ((0.335, 0.665), (0.335, 0.665), (0.5, 0.5), 7.5, "discrete", 1024, "ldm"),
    "sd3-512-best": ((0.1363, 0.7949), (0.0596, 0.1505), (0.5085, 0.5153), 4.5, "flowmatch", 512, "sd3"),
    "sd3-512-distilled": ((0.2255, 0.5821), (0.1071, 0.3153), (0.6229, 0.7043), 4.5, "flowmatch", 512, "sd3"),
    "sd3-512-start": ((0.335, 0.665), (0.335, 0.665), (0.5, 0.5), 4.5, "flowmatch", 512, "sd3"),
    "sd3-1024-best": ((0.3176, 0.7630), (0.1494, 0.3596), (0.4398, 0.9154), 4.5, "flowmatch", 1024, "sd3"),
    "sd3-1024-distilled": ((0.4026, 0.7317), (0.1625, 0.4086), (0.4975, 0.5972), 4.5, "flowmatch", 1024, "sd3"),
    "sd3-1024-start": ((0.335, 0.665), (0.335, 0.665), (0.5, 0.5), 4.5, "flowmatch", 1024, "sd3"),
    "flux-best": ((0.1713, 0.3654), (0.0823, 0.1852), (0.6495, 0.7026), 3.5, "flowmatch", 1024, "flux"),
    "flux-start": ((0.335, 0.665), (0.335, 0.665), (0.5, 0.5), 3.5, "flowmatch", 1024, "flux"),
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not here")
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_published_tables(name, tmp_path):
    first, last, weights, guidance, schedule, pixels, backend = EXPECTED[name]
    table = load_table(PUBLISHED / f"{name}.pkl")
    assert table.positions.shape == ((8 if backend == "flux" else 10), 2)
    assert table.positions[0].tolist() == pytest.approx(first, abs=1e-4)
    assert table.positions[-1].tolist() == pytest.approx(last, abs=1e-4)
    assert table.weights[[0, -1], 0].tolist() == pytest.approx(weights, abs=1e-4)
    assert bool((table.scale_dir == 1).all()) and bool((table.scale_time == 1).all())
    assert (table.guidance_rate, table.schedule_type, table.img_resolution, table.backend) == (
        guidance,
        schedule,
        pixels,
        backend,
    )
    assert (table.schedule_rho, table.dataset_name, table.afs, table.sampler_stu) == (1.0, "ms_coco", False, "epd")
    assert table.backend_config["resolution"] == pixels
    save_table(table, tmp_path / "t.pkl")
    again = load_table(tmp_path / "t.pkl")
    torch.testing.assert_close(again.positions, table.positions, rtol=0, atol=1e-6)
    assert again.metadata() == table.metadata()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not here")
def test_published_start_is_our_cold_start():
    published = load_table(PUBLISHED / "sd15-start.pkl")
    ours = cold_start_table(11, 2)
    torch.testing.assert_close(ours.positions, published.positions, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.weights, published.weights, rtol=0, atol=1e-7)


# --- The cold start. ---


@pytest.mark.parametrize("points", [1, 2, 3, 5, 16, 100])
def test_cold_start_is_symmetric_and_equally_spaced(points):
    table = cold_start_table(6, points)
    row = table.positions[0]
    assert table.positions.shape == (5, points) and bool((table.positions == row).all())
    torch.testing.assert_close(row + row.flip(0), torch.ones(points, dtype=torch.float64), rtol=0, atol=1e-12)
    gaps = row.diff()
    assert bool(((gaps - 0.66 / points).abs() < 1e-12).all())
    assert table.weights.tolist() == [[1 / points] * points] * 5


def test_cold_start_of_two_points():
    assert start_positions(2) == pytest.approx([0.335, 0.665], abs=1e-15)
    assert start_positions(3, 0.4, 0.1) == pytest.approx([0.3, 0.4, 0.5], abs=1e-15)


@pytest.mark.parametrize(
    "arguments", [(0,), (2, 0.5, 1.0), (2, 0.5, -0.1), (2, 0.5, 0.0), (1, 0.0), (1, NAN), (2, 0.5, NAN)]
)
def test_cold_start_refuses_positions_outside(arguments):
    with pytest.raises(TableError):
        start_positions(*arguments)


def test_cold_start_refuses_a_schedule_without_intervals():
    with pytest.raises(TableError, match="num_steps is 1"):
        cold_start_table(1, 2)
