"""Process groups: two real processes under torchrun (Gloo, and NCCL where there are two GPUs), and plain ones alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launchers import NEEDS_A_GPU, NEEDS_TWO_GPUS, free_port

from torch_utils import distributed
from torch_utils.distributed import DistributedError

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Runs under torchrun; each rank writes what it saw. Rank r holds the value r + 1 nearly everywhere.
PROGRAM = """
import json, sys, torch
import torch.distributed as dist
from torch_utils import distributed as d

d.init(sys.argv[2])
d.init(sys.argv[2])
r = d.rank()
seen = {"rank": r, "world": d.world_size(), "main": d.is_main()}
seen["device"], seen["backend"] = str(d.device()), dist.get_backend()
seen["gathered"] = d.all_gather(torch.tensor([[r + 1.0, 10.0], [r + 1.5, 20.0]], requires_grad=True)).tolist()
seen["strided"] = d.all_gather(torch.arange(4).view(2, 2).t() + 10 * r).tolist()
seen["types"] = [
    d.all_gather(torch.tensor([r, 1]).to(t)).to(torch.float64).tolist()
    for t in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
]
whole = torch.arange(6.0)
seen["restored"] = torch.equal(d.all_gather(whole[d.shard(6).start:d.shard(6).stop]), whole)
seen["objects"] = d.all_gather_objects({"rank": r, "text": "x" * (r * 1000)})
seen["from0"] = d.broadcast_object("of rank %d" % r)
seen["from1"] = d.broadcast_object(["of rank", r], src=1)
called = []
seen["done"] = d.on_main(lambda: called.append(r) or {"by": r}), called
seen["shards"] = [list(d.shard(n)) for n in (0, 1, 4, 5)]
seen["letters"] = d.shard("abc")
asked = []
def tenfold(a, b):
    asked.append(a.flatten().tolist())
    return (10 * a + b)[:, :1].contiguous()
seen["shared"] = []
for n in (1, 4, 5):
    a, b = torch.arange(2.0 * n).view(n, 2), torch.ones(n, 2)
    seen["shared"].append(d.share_rows(tenfold, a.to(d.device()), b.to(d.device())).flatten().tolist())
seen["asked"], seen["local"] = asked, d.local_world_size()
refused = []
for bad in (torch.zeros(2 + r), torch.zeros(2, dtype=torch.float64 if r else torch.float32), torch.tensor(1.0)):
    try:
        d.all_gather(bad)
    except ValueError as error:
        refused.append(str(error))
seen["refused"] = refused
d.print0("message of rank", r)
d.print0("table of rank", r, file=sys.stdout)
d.barrier()
d.shutdown()
seen["after"] = [dist.is_initialized(), d.rank(), d.world_size()]
json.dump(seen, open(f"{sys.argv[1]}/rank{r}.json", "w"))
"""


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def torchrun(program: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [f"--master_port={free_port()}", str(program), *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=NEEDS_TWO_GPUS)])
def two_ranks(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    result = torchrun(folder / "program.py", 2, str(folder), request.param)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)], result


def test_every_rank_knows_its_place(two_ranks):
    seen, _ = two_ranks
    assert [(s["rank"], s["world"], s["main"]) for s in seen] == [(0, 2, True), (1, 2, False)]
    placed = [(s["device"], s["backend"]) for s in seen]
    assert placed in ([("cpu", "gloo")] * 2, [("cuda:0", "nccl"), ("cuda:1", "nccl")])
    assert all(s["after"] == [False, 0, 1] for s in seen)


def test_all_gather_joins_in_rank_order(two_ranks):
    for seen in two_ranks[0]:
        assert seen["gathered"] == [[1.0, 10.0], [1.5, 20.0], [2.0, 10.0], [2.5, 20.0]]
        assert seen["strided"] == [[0, 2], [1, 3], [10, 12], [11, 13]]
        assert seen["types"] == [[0.0, 1.0, 1.0, 1.0]] * 6
        assert seen["restored"]


def test_all_gather_refuses_unequal_tensors_on_every_rank(two_ranks):
    for seen in two_ranks[0]:
        assert len(seen["refused"]) == 3
        assert "(2,)" in seen["refused"][0]
        assert "(3,)" in seen["refused"][0]
        assert "torch.float64" in seen["refused"][1]
        assert "at least one dimension" in seen["refused"][2]


def test_rows_are_worked_out_in_shares_and_known_to_all(two_ranks):
    for seen, last in zip(two_ranks[0], ([4.0, 5.0], [8.0, 9.0]), strict=True):
        assert seen["shared"] == [[20.0 * row + 1 for row in range(n)] for n in (1, 4, 5)]
        assert [len(part) for part in seen["asked"]] == [2, 4, 6]  # halves, rounded up, of 1, 4 and 5 rows of two
        assert seen["asked"][2][-2:] == last
        assert seen["local"] == 2
    assert two_ranks[0][1]["asked"][2] == [6.0, 7.0, 8.0, 9.0, 8.0, 9.0]  # an uneven share repeats the last row


def test_objects_travel(two_ranks):
    for seen in two_ranks[0]:
        assert seen["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 1000}]
        assert seen["from0"] == "of rank 0"
        assert seen["from1"] == ["of rank", 1]


def test_what_the_main_rank_does_is_known_to_all(two_ranks):
    assert [seen["done"] for seen in two_ranks[0]] == [[{"by": 0}, [0]], [{"by": 0}, []]]


def test_shards_are_contiguous_complete_and_even(two_ranks):
    first, second = two_ranks[0]
    for n, a, b in zip((0, 1, 4, 5), first["shards"], second["shards"], strict=True):
        assert a + b == list(range(n))
        assert abs(len(a) - len(b)) <= 1
    assert first["letters"] + second["letters"] == "abc"


def test_only_rank_0_prints_and_to_stderr(two_ranks):
    result = two_ranks[1]
    assert result.stderr.count("message of rank") == 1
    assert "message of rank 0" in result.stderr
    assert result.stdout == "table of rank 0\n"


@pytest.fixture
def alone(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    distributed.shutdown()


@pytest.mark.parametrize("port", [None, "29600"])
def test_plain_python_starts_no_group(alone, port):
    if port is not None:
        alone.setenv("MASTER_PORT", port)
        alone.setenv("MASTER_ADDR", "192.0.2.1")
    distributed.init("cpu")
    distributed.init()
    assert not dist.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.device() == torch.device("cpu")


def test_torchrun_with_one_process_needs_no_group(alone):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        alone.setenv(name, value)
    distributed.init("cpu")
    assert not dist.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_a_launch_is_no_launch(alone, name):
    alone.setenv(name, "2")
    distributed.init("cpu")
    assert not dist.is_initialized()


def test_helpers_are_the_identity_alone(alone, capsys):
    distributed.init("cpu")
    x = torch.randn(3, 2)
    assert torch.equal(distributed.all_gather(x), x)
    assert not distributed.all_gather(x.clone().requires_grad_()).requires_grad
    box = {"a": x}
    assert distributed.broadcast_object(box) is box
    assert distributed.all_gather_objects(box) == [box]
    assert distributed.on_main(lambda: box) is box
    distributed.barrier()
    assert distributed.shard(3) == range(3)
    assert distributed.shard(["a", "b"]) == ["a", "b"]
    distributed.print0("one", 2)
    assert capsys.readouterr() == ("", "one 2\n")


def test_mistakes_in_calls_show_alone_too(alone):
    distributed.init("cpu")
    with pytest.raises(ValueError, match="at least one dimension"):
        distributed.all_gather(torch.tensor(1.0))
    with pytest.raises(ValueError, match="after cpu had been chosen"):
        distributed.init("cuda")


def test_device_needs_init(alone):
    with pytest.raises(RuntimeError, match="init"):
        distributed.device()


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        ({}, "gpu", "unknown device 'gpu'"),
        ({}, "meta", "unsupported device 'meta'"),
        ({}, "cuda:99", "GPU 99 was asked for, but"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "99"}, "cuda", "or use the device cpu"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda:0", "every process on one GPU"),
        ({"RANK": "1", "WORLD_SIZE": "two", "LOCAL_RANK": "1"}, "cpu", "WORLD_SIZE is 'two'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "cpu", "LOCAL_RANK is ''"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu", "rank 1 could not join"),
    ],
)
def test_launches_that_cannot_work_are_one_line(alone, variables, device, message):
    for name, value in variables.items():
        alone.setenv(name, value)
    with pytest.raises(DistributedError) as caught:
        distributed.init(device)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lost_rank_ends_in_an_error_instead_of_waiting(alone):
    alone.setenv("RANK", "0")
    alone.setenv("WORLD_SIZE", "2")
    alone.setenv("LOCAL_RANK", "0")
    alone.setenv("MASTER_ADDR", "127.0.0.1")
    alone.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(DistributedError, match="did all ranks start"):
        distributed.init("cpu", timeout_minutes=1 / 60)


@NEEDS_A_GPU
def test_auto_takes_the_gpu(alone):
    distributed.init()
    assert distributed.device() == torch.device("cuda", 0)
