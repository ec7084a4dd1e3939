"""What a solver table says besides its numbers. Needs no torch, so that a command line can check it at once."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields

from torch_utils.errors import UserError
from torch_utils.untrusted import parse_json

# The solvers that read a table, and the highest `max_order` of those that have one: solver_utils owns these numbers,
# but needs torch; a test keeps the two in step.
TABLE_ORDERS: dict[str, int | None] = {"epd": None, "ipndm": 4, "dpmpp": 3}


class TableError(UserError):
    """A solver table, or a file that should hold one, is not usable. The message is one line."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TableMetadata:
    """The conditions that a table was made for, checked when built (`TableError`). Field names are the published ones.

    `None` for `sigma_min`, `sigma_max`, `img_resolution` and the flow-matching fields means "the model's own value".
    """

    dataset_name: str = "ms_coco"  # the backbone, a key of training.denoisers.create_model
    num_steps: int | None = None  # nodes N of the schedule; a table has N-1 rows and fills this in
    num_points: int | None = None  # intermediate points K in an interval; a table fills this in
    guidance_type: str = "cfg"
    guidance_rate: float = 7.5  # >= 0; 1 is unguided
    schedule_type: str = "discrete"  # a type of solver_utils.get_schedule
    schedule_rho: float = 1.0  # > 0
    sigma_min: float | None = None  # >= 0
    sigma_max: float | None = None  # > sigma_min
    afs: bool = False  # replace the first slope by x / sqrt(1 + sigma_0^2)
    backend: str = "ldm"  # backbone family in the published files
    backend_config: dict = field(default_factory=dict)  # plain JSON object; None, as files have it, becomes {}
    img_resolution: int | None = None  # pixels, as stored: the published SD 1.5 tables say 1024 and sample 512
    flowmatch_mu: float | None = None  # of schedule flowmatch, the log of its time shift; goes before flowmatch_shift
    flowmatch_shift: float | None = None  # of schedule flowmatch, the time shift itself
    sampler_stu: str = "epd"  # the solver that reads the table: epd, or EPD slopes in a step of ipndm or dpmpp
    scale_dir_range: float = 0.0  # a .pkl keeps scale_dir inside 1 +- this; 0: 1 +- 1 where a scale differs from 1
    scale_time_range: float = 0.0  # the same for scale_time
    sampler_tea: str = "dpm"  # unused like M, alpha, fcn and predict_x0, but kept so that no file loses what it said
    M: int = 1
    alpha: float = 10.0
    fcn: bool = False
    max_order: int | None = 2  # of ipndm (1-4) and dpmpp (1-3), unused by epd; None: the solver's default
    predict_x0: bool = False
    lower_order_final: bool = True  # of dpmpp: lower orders in the last intervals

    def __post_init__(self):
        if self.backend_config is None:
            object.__setattr__(self, "backend_config", {})
        for entry in fields(TableMetadata):
            object.__setattr__(self, entry.name, _typed(entry.name, str(entry.type), getattr(self, entry.name)))
        for name, lowest in (("num_steps", 2), ("num_points", 1), ("img_resolution", 1), ("max_order", 1), ("M", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise TableError(f"{name} is {value}; it must be at least {lowest}")
        for name in ("guidance_rate", "sigma_min", "scale_dir_range", "scale_time_range"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise TableError(f"{name} is {value:g}; it must not be negative")
        if self.schedule_rho <= 0:
            raise TableError(f"schedule_rho is {self.schedule_rho:g}; it must be positive")
        if self.sigma_max is not None and self.sigma_max <= (self.sigma_min or 0.0):
            raise TableError(f"sigma_max is {self.sigma_max:g}; it must be greater than sigma_min and 0")
        if self.sampler_stu not in TABLE_ORDERS:
            raise TableError(f"sampler_stu is {ascii(self.sampler_stu)[:80]}; known are {', '.join(TABLE_ORDERS)}")
        highest = TABLE_ORDERS[self.sampler_stu]
        if highest is not None and self.max_order is not None and self.max_order > highest:
            raise TableError(f"max_order is {self.max_order}; {self.sampler_stu} has orders 1 to {highest}")

    def metadata(self) -> dict:
        """-> every field of this class by name, as plain JSON values; a copy."""
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in fields(TableMetadata)}


def _typed(name: str, kind: str, value: object) -> object:
    """`value` as the annotated type `kind`; an int is taken for a float, nothing else is converted."""
    if value is None and kind.endswith("| None"):
        return None
    match kind.removesuffix(" | None"), value:
        case ("bool", bool()):
            return value
        case ("int", int()) if not isinstance(value, bool):
            if abs(value) < 2**31:
                return value
            raise TableError(f"{name} is too large")
        case ("float", int() | float()) if not isinstance(value, bool):
            if abs(value) <= 1e300:  # false for nan; an int beyond float's range must not reach float()
                return float(value)
            raise TableError(f"{name} must be a finite number")
        case ("str", str()):
            if value and value.isprintable() and len(value) <= 1000:
                return value
            raise TableError(f"{name} must be a printable text of 1 to 1000 characters")
        case ("dict", dict()):
            return _json_copy(name, value)
    raise TableError(f"{name} must be of type {kind}, not {type(value).__name__}")


def _json_copy(name: str, value: dict) -> dict:
    """A deep copy of a JSON object; what JSON cannot hold unchanged is an error."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        result = parse_json(text)
    except (TypeError, ValueError, RecursionError) as err:
        raise TableError(f"{name} must be a JSON object of finite numbers, texts, lists and objects") from err
    if result != value:
        raise TableError(f"{name} must be a JSON object (keys are texts, no tuples)")
    return result
