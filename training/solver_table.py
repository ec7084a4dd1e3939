"""The solver table as a value: its numbers, checked once, and what they were made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch

from training.table_metadata import TableError, TableMetadata

ARRAYS = ("positions", "weights", "scale_dir", "scale_time")


@dataclass(frozen=True, eq=False)
class SolverTable(TableMetadata):
    """The K intermediate points of each of the N-1 intervals of an EPD solver (arXiv 2507.14797, 2512.22796).

    Row i holds, for the interval from sigma_i to sigma_{i+1}: r, w, c, a of the update

        tau_k = sigma_{i+1}^r_k * sigma_i^(1 - r_k),    x <- x + (sigma_{i+1} - sigma_i) * sum_k w_k * c_k * d_k

    where d_k carries the time scale a_k. Each array becomes a float64 CPU tensor `[N-1, K]`, or `[B, N-1, K]` with one
    table per sample in rollouts; lists are accepted. Raises `TableError`. Tables compare by identity: compare
    `sha256()` for equal content. Metadata fields are keywords, see `TableMetadata`.
    """

    positions: torch.Tensor  # r, strictly increasing along K, inside (0, 1)
    weights: torch.Tensor  # w > 0, each row sums to 1 within 1e-5
    # None only on construction: the scales become ones, the numbers those of the arrays.
    scale_dir: torch.Tensor = None  # type: ignore[assignment]  # c > 0
    scale_time: torch.Tensor = None  # type: ignore[assignment]  # a > 0
    num_steps: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    num_points: int = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self):
        for name in ARRAYS:
            object.__setattr__(self, name, self._array(name))
        rows, columns = self.positions.shape[-2:]
        for name, actual in (("num_steps", rows + 1), ("num_points", columns)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, actual)
        super().__post_init__()
        if (self.num_steps, self.num_points) != (rows + 1, columns):
            stated = f"num_steps {self.num_steps} and num_points {self.num_points}"
            raise TableError(f"{stated} do not fit positions of shape {list(self.positions.shape)}")

        increasing = (self.positions.diff(dim=-1) > 0).all(dim=-1)
        inside = ((self.positions > 0) & (self.positions < 1)).all(dim=-1)
        self._check_rows("positions", increasing & inside, "increase strictly inside (0, 1)")
        self._check_rows("weights", (self.weights > 0).all(dim=-1), "be positive")
        self._check_rows("weights", (self.weights.sum(dim=-1) - 1).abs() <= 1e-5, "sum to 1 within 1e-5")
        for name in ("scale_dir", "scale_time"):
            self._check_rows(name, (getattr(self, name) > 0).all(dim=-1), "be positive")

    def _array(self, name: str) -> torch.Tensor:
        """The array as an own float64 tensor of the shape of `positions`; `positions` itself must come first."""
        value = getattr(self, name)
        if value is None and name in ("scale_dir", "scale_time"):
            return torch.ones_like(self.positions)
        try:
            array = (
                torch.as_tensor(value, dtype=torch.float64, device="cpu")
                .detach()
                .clone(memory_format=torch.contiguous_format)
            )
        except (TypeError, ValueError, RuntimeError, OverflowError) as err:
            raise TableError(f"{name} must be numbers in rows of equal length") from err
        if name == "positions" and (array.ndim not in (2, 3) or array.numel() == 0):
            raise TableError(f"positions must have shape [N-1, K] or [B, N-1, K], not {list(array.shape)}")
        if name != "positions" and array.shape != self.positions.shape:
            raise TableError(f"{name} has shape {list(array.shape)}, positions has {list(self.positions.shape)}")
        if not array.isfinite().all():
            raise TableError(f"{name} must be finite numbers")
        return array

    def _check_rows(self, name: str, good: torch.Tensor, rule: str):
        """good: bool `[N-1]` or `[B, N-1]`."""
        if not good.all():
            index = tuple((~good).nonzero()[0].tolist())
            row = ", ".join(f"{value:.9g}" for value in getattr(self, name)[index][:8].tolist())
            raise TableError(f"{name}{list(index)} is {row}: it must {rule}")

    @property
    def is_batched(self) -> bool:
        """Whether there is a leading sample axis."""
        return self.positions.ndim == 3

    def to_dict(self) -> dict:
        """-> arrays as nested lists and all metadata: plain JSON values that keep every bit."""
        return {**{name: getattr(self, name).tolist() for name in ARRAYS}, **self.metadata()}

    @classmethod
    def from_dict(cls, values: Mapping) -> SolverTable:
        """Inverse of `to_dict`; what is absent takes its default, an unknown key is a `TableError`."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise TableError(f"unknown entry {ascii(key)[:80]}")
        for name in ("positions", "weights"):
            if name not in values:
                raise TableError(f"{name} is missing")
        return cls(**values)

    def sha256(self) -> str:
        """-> hex SHA-256 of numbers and metadata, the same whichever lossless format the table was read from."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()
