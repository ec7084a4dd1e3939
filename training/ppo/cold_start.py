"""The table that tuning starts from. Torch is imported only to build it, so that a dry run need not wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.table_metadata import TableError

if TYPE_CHECKING:
    from training.solver_table import SolverTable

SPREAD = 0.66  # K points SPREAD / K apart: two of them give 0.335 and 0.665, the published start tables


def start_positions(num_points: int, r_base: float = 0.5, r_epsilon: float | None = None) -> list[float]:
    """-> the K positions of one interval, `r_epsilon` apart and symmetric around `r_base`; K = 1 is `r_base` alone.

    `r_epsilon=None` means SPREAD / K, which keeps any K inside `r_base` +- 0.33. Raises `TableError` unless all K lie
    inside (0, 1) and increase.
    """
    if num_points < 1:
        raise TableError(f"num_points is {num_points}; it must be at least 1")
    gap = SPREAD / num_points if r_epsilon is None else r_epsilon
    positions = [r_base + (k - (num_points - 1) / 2) * gap for k in range(num_points)]
    if not (positions[0] > 0 and positions[-1] < 1 and gap > 0):
        raise TableError(
            f"{num_points} points {gap:g} apart around {r_base:g} run from {positions[0]:g} to {positions[-1]:g}; "
            "r_base and r_epsilon must keep them apart and inside (0, 1)"
        )
    return positions


def cold_start_table(
    num_steps: int, num_points: int, r_base: float = 0.5, r_epsilon: float | None = None
) -> SolverTable:
    """-> the start table of a schedule with `num_steps` nodes (`num_steps - 1` equal rows): positions of
    `start_positions`, weights 1/K, scales 1, default metadata (change it with `dataclasses.replace`).
    """
    import torch

    from training.solver_table import SolverTable

    if num_steps < 2:
        raise TableError(f"num_steps is {num_steps}; it must be at least 2")
    positions = torch.tensor(start_positions(num_points, r_base, r_epsilon), dtype=torch.float64)
    positions = positions.expand(num_steps - 1, num_points)
    return SolverTable(positions, torch.full_like(positions, 1 / num_points))
