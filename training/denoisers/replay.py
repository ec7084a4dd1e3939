"""Networks compiled and replayed as CUDA graphs, so that a call costs the GPU's time and not the host's."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib.util import cache_dir
from torch_utils import distributed

# Options of torch.compile. "max" tries many kernels for every size of matrix product, some 14 s each (H100), and says
# nothing of them; tuning the pointwise kernels as well was slower in the end (docs/performance.md).
COMPILE_MODES: dict[str, dict[str, bool | int | str]] = {
    "off": {},
    "default": {},
    "max": {
        "max_autotune_gemm": True,
        "max_autotune_conv_backends": "ATEN",
        "max_autotune_report_choices_stats": False,
        "autotune_num_choices_displayed": 0,
    },
}
# Where the compiler keeps its results; it settles on a temporary folder when it is first imported, by diffusers too.
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MAX_GRAPHS = 8  # as many as torch.compile keeps of one function; further shapes run as they are


class Replayed:
    """`function(*tensors) -> tensor`, compiled at the first call of every shape while `compiling` is set.

    Compiling changes the rounding; mode "default" chooses no kernel by measuring where rounding depends on it. So what
    a call gives depends on its inputs and on `compiling`, and not on the calls before it, up to MAX_GRAPHS shapes. On
    the CPU, with gradients and with mode "off" every call runs as it is.
    """

    def __init__(self, function: Callable[..., Tensor], title: str, mode: str, device: torch.device):
        """`title` names the function in messages; `mode` is of COMPILE_MODES."""
        self.function, self.title, self.mode = function, title, mode
        self.active = device.type == "cuda" and mode != "off"
        self.compiling = False
        self.graphs: dict[tuple, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.active else None
        if self.active:
            os.environ.setdefault(CACHE_VARIABLE, str(cache_dir() / "compiled"))

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.active or not self.compiling or torch.is_grad_enabled():
            return self.function(*inputs)
        shape = tuple((part.shape, part.dtype) for part in inputs)
        if shape not in self.graphs and len(self.graphs) < MAX_GRAPHS:
            self._compile(shape, inputs)
        run = self.graphs.get(shape, self.function)
        return run(*inputs)

    def _compile(self, shape: tuple, inputs: tuple[Tensor, ...]) -> None:
        rows = len(inputs[0])
        self._say(
            f"compiling the {self.title} for {rows} rows; minutes at first, seconds from {os.environ[CACHE_VARIABLE]}"
        )
        started = time.perf_counter()
        # The compiler's helpers stay in memory, some hundred MB each: the ranks of a machine share its cores.
        helpers = max(min(8, len(os.sched_getaffinity(0)) // distributed.local_world_size()), 1)
        deterministic = self.mode == "default"  # "max" is nothing but choosing by measurements
        try:
            compiled = torch.compile(
                self.function,
                dynamic=False,
                fullgraph=True,
                options={**COMPILE_MODES[self.mode], "compile_threads": helpers, "deterministic": deterministic},
            )
            self.graphs[shape] = _Graph(compiled, inputs, self.pool)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.active = False
            reason = str(error).strip().split("\n")[0]
            self._say(f"the {self.title} cannot be compiled here and runs slower ({reason}); --compile off skips this")
            return
        self._say(f"compiled the {self.title} for {rows} rows in {time.perf_counter() - started:.0f} s")

    def _say(self, message: str) -> None:
        if distributed.is_main():
            tqdm.write(f"note: {message}", file=sys.stderr)


class _Graph:
    """One call of `function` on inputs of fixed shapes, recorded."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: torch.cuda._POOL_HANDLE | None
    ):
        self.inputs = [part.clone() for part in inputs]
        # Compilation and the libraries' first calls allocate and wait, which a capture must not.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's among them, may go on calling the driver.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, theirs in zip(self.inputs, inputs, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.output.clone()  # the next replay writes to the same place
