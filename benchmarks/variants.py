"""Which solvers with which options are measured, and one run of each whose network calls are counted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from solver_utils import NFE, SOLVER_OPTIONS, SolverError, count_nfe
from solvers import SOLVERS, Callback
from training.ppo.cold_start import cold_start_table

NUM_POINTS = 2  # K of the start tables that the EPD solvers get


class CountError(RuntimeError):
    """A solver that called the network more or less often than `count_nfe` says."""


@dataclass(frozen=True)
class Variant:
    """A solver with options. `label` is unique and stands in every file that the benchmark writes."""

    label: str
    solver: str  # a key of solvers.SOLVERS
    options: dict[str, object] = field(default_factory=dict)

    def cost(self, num_steps: int) -> NFE:
        """Of one image over `num_steps` nodes, one guidance branch counted in `forwards`."""
        return count_nfe(self.solver, num_steps, NUM_POINTS, guided=False, **self.options)

    def num_steps(self, parallel_nfe: int) -> int | None:
        """Nodes of the schedule that spends exactly `parallel_nfe` sequential calls; None if there is none."""
        per_interval = self.cost(2).parallel_nfe
        return None if parallel_nfe % per_interval else parallel_nfe // per_interval + 1

    def sampler(self, num_steps: int) -> Callable[..., Tensor]:
        """The solver with its options, and with the start table of `num_steps` nodes if it takes a table."""
        options = dict(self.options)
        if "table" in SOLVER_OPTIONS[self.solver]:
            options["table"] = cold_start_table(num_steps, NUM_POINTS)
        return functools.partial(SOLVERS[self.solver], **options)


VARIANTS = (
    Variant("ddim", "ddim"),
    Variant("ipndm 2", "ipndm", {"max_order": 2}),
    Variant("ipndm 4", "ipndm", {"max_order": 4}),
    Variant("ipndm_v 2", "ipndm_v", {"max_order": 2}),
    Variant("ipndm_v 3", "ipndm_v", {"max_order": 3}),
    Variant("ipndm_v 4", "ipndm_v", {"max_order": 4}),
    Variant("deis 2", "deis", {"max_order": 2}),
    Variant("deis 3", "deis", {"max_order": 3}),
    Variant("dpmpp 2", "dpmpp", {"max_order": 2}),
    Variant("dpmpp 3", "dpmpp", {"max_order": 3}),
    Variant("unipc bh1 2", "unipc", {"max_order": 2, "variant": "bh1"}),
    Variant("unipc bh2 2", "unipc", {"max_order": 2, "variant": "bh2"}),
    Variant("unipc bh2 3", "unipc", {"max_order": 3, "variant": "bh2"}),
    Variant("heun", "heun"),
    Variant("edm", "edm"),
    Variant("dpm2", "dpm2"),
    Variant("dpm, 2 inner", "dpm", {"inner_steps": 2}),
    Variant("epd", "epd"),
    Variant("epd_ipndm 2", "epd_ipndm", {"max_order": 2}),
    Variant("epd_ipndm 4", "epd_ipndm", {"max_order": 4}),
    Variant("epd_dpmpp 2", "epd_dpmpp", {"max_order": 2}),
)


def select_variants(solvers: Sequence[str]) -> list[Variant]:
    """The variants of the named solvers, all for an empty list. Raises SolverError for a name that nobody has."""
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown:
        raise SolverError(f"--solvers: unknown solver '{unknown[0]}'; use some of {', '.join(SOLVERS)}")
    return [variant for variant in VARIANTS if not solvers or variant.solver in solvers]


@contextlib.contextmanager
def counted(variant: Variant, net, num_steps: int, batch: int) -> Iterator[NFE]:
    """Around one run of `batch` images: gives its cost, and raises CountError unless the net counted exactly that."""
    cost = variant.cost(num_steps)
    calls, rows = net.calls, net.rows
    yield cost
    made, promised = (net.calls - calls, net.rows - rows), (cost.parallel_nfe, cost.nfe * batch)
    if made != promised:
        raise CountError(
            f"{variant.label} over {num_steps} nodes made {made[0]} network calls with {made[1]} rows, "
            f"count_nfe says {promised[0]} with {promised[1]}"
        )


@torch.no_grad()
def run_counted(
    variant: Variant, net, x: Tensor, sigmas: Tensor, cond=None, callback: Callback | None = None
) -> Tensor:
    """The final state of one run, its network calls counted."""
    with counted(variant, net, len(sigmas), len(x)):
        return variant.sampler(len(sigmas))(net, x, sigmas, cond, callback=callback)
