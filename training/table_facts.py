"""What can be said of a solver table without a model's weights: its noise levels and its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from solver_utils import NFE, SolverError, count_nfe, get_schedule

if TYPE_CHECKING:
    from training.solver_table import SolverTable

TABLE_SOLVERS = {"epd": "epd", "ipndm": "epd_ipndm", "dpmpp": "epd_dpmpp"}  # a table's sampler_stu -> key of SOLVERS


class HasShift(Protocol):
    @property
    def schedule_type(self) -> str: ...
    @property
    def flowmatch_mu(self) -> float | None: ...
    @property
    def flowmatch_shift(self) -> float | None: ...


def time_shift(made_for: HasShift) -> tuple[float | None, float | None]:
    """(shift, mu) of schedule flowmatch, at most one of them. A table that names both, as the published FLUX ones do,
    means mu: their scheduler shifts dynamically. Other schedule types have neither, whatever a table says."""
    if made_for.schedule_type != "flowmatch":
        return None, None
    mu = made_for.flowmatch_mu
    return made_for.flowmatch_shift if mu is None else None, mu


def table_cost(table: SolverTable) -> NFE:
    """The evaluations that one image costs."""
    solver = TABLE_SOLVERS[table.sampler_stu]
    return count_nfe(solver, table.num_steps, table.num_points, table.guidance_rate != 1, table.afs)


def table_sigmas(table: SolverTable) -> list[float] | None:
    """The `num_steps` noise levels that a table is made for, falling.

    What a table leaves to its model is that of the backbone's own configuration in `src/`; None where that is not
    enough: the backbone is none of this project, or steps through a time that the table does not tell.
    """
    from training.denoisers import BACKBONES

    shift, mu = time_shift(table)
    low, high, noise = table.sigma_min, table.sigma_max, None
    backbone = BACKBONES.get(table.dataset_name)
    if backbone is not None and (table.schedule_type == "discrete" or low is None or high is None):
        noise = backbone.noise()
    if noise is not None:
        low = noise.sigma_min if low is None else low
        high = noise.sigma_max if high is None else high
    own_time = table.schedule_type == "flowmatch" and shift is None and mu is None
    if low is None or high is None or own_time or (table.schedule_type == "discrete" and noise is None):
        return None
    net = noise if table.schedule_type == "discrete" else None
    try:
        schedule = table.schedule_type, table.schedule_rho, net
        return get_schedule(table.num_steps, low, high, None, *schedule, shift=shift, mu=mu).tolist()
    except SolverError:  # nothing could be sampled with such a table; its numbers can be looked at all the same
        return None
