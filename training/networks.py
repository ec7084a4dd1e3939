"""The solver table as the torch module that published snapshot files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from training.pickle_reader import PARAMETERS
from training.solver_table import SolverTable
from training.table_metadata import TableError, TableMetadata

# In a snapshot the names of the two scale arrays stand for the ranges of their logits.
_ATTRIBUTES = {"scale_dir_range": "scale_dir", "scale_time_range": "scale_time"}


class EPD_predictor(torch.nn.Module):
    """Solver table in the parametrisation of the published files (arXiv 2507.14797), float32 logits `[N-1, K]`:

        positions = sigmoid(r_params)    weights = softmax(weight_s) over K
        scale_dir = 2 s sigmoid(scale_dir_params / 2) + 1 - s, with the range s = self.scale_dir; 1 if s is 0
        scale_time: the same with scale_time_params and self.scale_time

    Every field of `TableMetadata` is an attribute of its name (the two ranges: `scale_dir`, `scale_time`), where the
    published sampler looks for it. Build it with `from_table`.
    """

    scale_dir: float
    scale_time: float

    def __init__(self, parameters: Mapping[str, torch.Tensor], metadata: TableMetadata):
        """parameters: the four logit arrays of `pickle_reader.PARAMETERS`, each `[N-1, K]`, stored as float32."""
        super().__init__()
        for name in PARAMETERS:
            self.register_parameter(name, torch.nn.Parameter(parameters[name].detach().float().contiguous().clone()))
        # Both are modules because the published class looks them up on an instance that it unpickles.
        self.sigmoid = torch.nn.Sigmoid()
        self.softmax = torch.nn.Softmax(dim=-1)
        for field, value in metadata.metadata().items():
            setattr(self, _ATTRIBUTES.get(field, field), value)

    def forward(self, batch_size: int, step_idx: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> positions, scale_dir, scale_time, weights of interval `step_idx`, each float32 `[batch_size, K]`."""
        positions, weights, scale_dir, scale_time = (
            array[step_idx].expand(batch_size, -1) for array in self._values(torch.float32)
        )
        return positions, scale_dir, scale_time, weights

    def _values(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> positions, weights, scale_dir, scale_time, each `[N-1, K]`."""
        r, w, c, a = (self.get_parameter(name).to(dtype) for name in PARAMETERS)

        def scale(logits: torch.Tensor, half_width: float) -> torch.Tensor:
            return 1 + half_width * (2 * self.sigmoid(logits / 2) - 1)

        return self.sigmoid(r), self.softmax(w), scale(c, self.scale_dir), scale(a, self.scale_time)

    def to_table(self) -> SolverTable:
        """-> the table, computed in float64. Raises `TableError` if the numbers or attributes do not make one."""
        return SolverTable(
            *(array.detach() for array in self._values(torch.float64)), **_metadata(vars(self)).metadata()
        )

    @classmethod
    def from_table(cls, table: SolverTable) -> EPD_predictor:
        """The predictor of one table. Raises `TableError` for a sample axis or a scale outside the format's range."""
        if table.is_batched:
            raise TableError(f"a predictor holds one table, not {len(table.positions)}; pick a sample first")
        scale_dir_params, scale_dir_range = _scale_logits("scale_dir", table.scale_dir, table.scale_dir_range)
        scale_time_params, scale_time_range = _scale_logits("scale_time", table.scale_time, table.scale_time_range)
        log_weights = table.weights.log()
        parameters = {
            "r_params": torch.logit(table.positions),
            "weight_s": log_weights - log_weights.mean(dim=-1, keepdim=True),
            "scale_dir_params": scale_dir_params,
            "scale_time_params": scale_time_params,
        }
        return cls(parameters, replace(table, scale_dir_range=scale_dir_range, scale_time_range=scale_time_range))

    @classmethod
    def from_snapshot(
        cls, parameters: Mapping[str, list[list[float]]], attributes: Mapping[str, object]
    ) -> EPD_predictor:
        """The predictor of a file that `pickle_reader.read_snapshot` has read. Raises `TableError`."""
        tensors = {name: torch.tensor(rows) for name, rows in parameters.items()}
        if len({tensor.shape for tensor in tensors.values()}) != 1:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise TableError(f"the parameters differ in shape: {shapes}")
        return cls(tensors, _metadata(attributes))


def _metadata(attributes: Mapping[str, Any]) -> TableMetadata:
    """Metadata from the attributes of a predictor; absent ones take their defaults, unknown ones are dropped."""
    stored = {field.name: _ATTRIBUTES.get(field.name, field.name) for field in fields(TableMetadata)}
    return TableMetadata(**{field: attributes[name] for field, name in stored.items() if name in attributes})


def _scale_logits(name: str, scale: torch.Tensor, declared: float) -> tuple[torch.Tensor, float]:
    """-> logits `[N-1, K]` of scales inside 1 +- s, and s: the declared range, or 1 where that is 0 and needed."""
    if declared == 0 and bool((scale == 1).all()):
        return torch.zeros_like(scale), 0.0
    half_width = declared or 1.0
    fraction = (scale - 1 + half_width) / (2 * half_width)
    outside = (fraction <= 0) | (fraction >= 1)
    if outside.any():
        raise TableError(
            f"{name} {scale[outside][0]:.9g} is outside ({1 - half_width:g}, {1 + half_width:g}), the range that the "
            f".pkl format stores for this table; save as .safetensors or .json, or set {name}_range"
        )
    return 2 * torch.logit(fraction), half_width
