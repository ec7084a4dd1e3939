"""A solver table as a scheduler of diffusers, for programs that call the network once for every `step`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from solver_utils import SolverError, check_options
from solvers import TABLE_STEPS, EPDSteps, analytical_slope
from training.denoisers import ModelError
from training.diffusers_plugin.noise import ModelNoise
from training.generate import SamplingPlan
from training.solver_table import ARRAYS, SolverTable
from training.table_hub import EPDTable, Source
from training.table_metadata import TableError


@dataclass
class EPDSchedulerOutput(BaseOutput):
    """prev_sample: where the next evaluation takes place, at the end the result. pred_original_sample: the data that
    this evaluation predicts, x - sigma slope. Both have shape and dtype of the sample."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class _Interval:
    """The interval that a run is in."""

    steps: EPDSteps  # of the whole run
    number: int  # in `steps`
    x: Tensor  # state at its node
    points: Tensor  # [B, K, C, H, W]
    slopes: list[Tensor] = field(default_factory=list)  # at the points so far


class EPDScheduler(SchedulerMixin, ConfigMixin):
    """EPD-Solver (arXiv 2507.14797) one network evaluation at a time.

    The K points of an interval, which `EPDPipeline` evaluates in one batch, come one after the other here, for the same
    image: N intervals take N (K + 1) calls of `step`, one less where the table has AFS. `timesteps` lists all of them,
    as fractional indices into the model's noise table; `sigmas` their noise levels and that of the result. Samples are
    data + sigma noise, as of Euler's and other sigma-space schedulers of diffusers.

    table                   `SolverTable.to_dict()`; a part of the configuration, so that saving keeps every bit.
    num_train_timesteps, beta_start, beta_end, beta_schedule
                            the model's noise table; scaled_linear only.
    prediction_type         epsilon or v_prediction.
    trained_betas, rescale_betas_zero_snr
                            of other noise tables; only None and False will do.

    Raises `TableError`, `ModelError` or `SolverError` (one line, all ValueErrors) for what cannot be sampled with.
    """

    # Whose entries a configuration may keep, so that another scheduler can be made of it again.
    _compatibles: ClassVar[list[str]] = [scheduler.name for scheduler in KarrasDiffusionSchedulers]

    _step_index: int | None
    _begin_index: int | None
    _interval: _Interval | None  # None before the first evaluation

    @register_to_config
    def __init__(
        self,
        table: Mapping | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ):
        if not isinstance(table, Mapping):
            raise TableError("a scheduler's configuration needs a solver table; use EPDScheduler.from_table")
        if trained_betas is not None or rescale_betas_zero_snr:
            raise ModelError("noise tables with trained_betas or rescale_betas_zero_snr are not supported")
        self.solver_table = SolverTable.from_dict(table)
        if self.solver_table.is_batched:
            raise SolverError(f"sampling takes one table, not {len(self.solver_table.positions)}; pick one of them")
        if self.solver_table.guidance_type != "cfg":
            raise TableError(f"the table is made for guidance {self.solver_table.guidance_type!a}; diffusers has cfg")
        self.plan = SamplingPlan.of_table(self.solver_table, None, "float32")
        check_options(self.plan.solver, self.plan.options)
        self.noise = ModelNoise(num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type)
        self.nodes = self.plan.sigmas(self.noise)  # [N + 1] float64 on the CPU
        steps = self.steps(torch.zeros(1, 1, 1, 1))
        self.levels = torch.cat([self.nodes[:-1, None], steps.points.times], 1).flatten()[int(self.plan.afs) :]
        self.sigmas = torch.cat([self.levels, self.nodes[-1:]])  # float64 on the CPU, whatever the samples are on
        self.set_timesteps()

    @classmethod
    def from_table(cls, table: Source, config: Mapping | None = None) -> EPDScheduler:
        """The scheduler of a table, which may be named as in `EPDTable.from_pretrained`.

        `config` is that of the scheduler that the model came with, `pipe.scheduler.config`: it says which noise levels
        the model knows. None is Stable Diffusion 1.x.
        """
        # Values that the other scheduler had by default count, though they are not our defaults.
        values = {name: value for name, value in (config or {}).items() if name != "_use_default_values"}
        return cls.from_config({**values, "table": EPDTable.of(table).table.to_dict()})

    def steps(self, x: Tensor, first: int = 0, max_rows: int | None = None) -> EPDSteps:
        """The solver's intervals from `first` on for states like `x`; see EPDSteps."""
        table = self.solver_table
        if first > 0:
            rest = {name: getattr(table, name)[first:] for name in ARRAYS}
            table = replace(table, num_steps=table.num_steps - first, **rest)
        afs = self.plan.afs and first == 0
        kind = TABLE_STEPS[self.plan.solver]
        return kind(x, self.nodes[first:], table, afs=afs, max_rows=max_rows, **self.plan.options)

    # The protocol of diffusers' schedulers.

    @property
    def order(self) -> int:
        """Evaluations of an interval."""
        return self.solver_table.num_points + 1

    @property
    def init_noise_sigma(self) -> float:
        """Of the sample to start from: standard normal noise times this."""
        return self.nodes[0].item()

    @property
    def step_index(self) -> int | None:
        """Evaluations done, those before the begin index counted; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Evaluation that a run starts from: the first of an interval, so a multiple of `order` where AFS is off."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Begin anew, with `timesteps` float32 `[N (K + 1)]` on `device`.

        `num_inference_steps` is the table's number of intervals N, or None; another is a `SolverError`.
        """
        intervals = len(self.nodes) - 1
        if num_inference_steps not in (None, intervals):
            raise SolverError(
                f"the table has {intervals} steps of {self.order} evaluations and no other number: "
                f"pass num_inference_steps={intervals}, not {num_inference_steps}"
            )
        self.num_inference_steps = intervals
        self.timesteps = self.noise.timestep(self.levels).to(device)
        self._step_index = self._begin_index = self._interval = None

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of the first evaluation at `timestep`, an entry of `timesteps` (or of `schedule_timesteps`)."""
        times = (self.timesteps if schedule_timesteps is None else schedule_timesteps).cpu()
        found = (times == torch.as_tensor(timestep, dtype=times.dtype).cpu()).nonzero()
        if len(found) == 0:
            raise SolverError(f"the table has no evaluation at timestep {float(timestep):g}; take one of `timesteps`")
        return int(found[0])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is to see of `sample [B, C, H, W]`: divided by sqrt(1 + sigma^2) of this evaluation."""
        index = self._index(timestep)
        return self.noise.seen(self._evaluated(sample, index), self.sigmas[index]).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> EPDSchedulerOutput | tuple[Tensor, Tensor]:
        """The network's `model_output` for `sample [B, C, H, W]` => the sample for the next evaluation.

        `sample` counts at the first evaluation of an interval, where it may be changed in between; at the points it is
        what the last step returned. Arithmetic is in float32 (float64 for such samples), results have its dtype.
        With `return_dict` an EPDSchedulerOutput, else a tuple of the same. Raises SolverError once all is done.
        """
        index = self._index(timestep)
        x = sample if sample.dtype == torch.float64 else sample.float()
        interval, stage = self._place(index)
        here, sigma = self._evaluated(x, index), self.sigmas[index]
        slope = self.noise.slope(model_output.to(x.dtype), here, sigma)
        present = self._interval
        if stage == 0:
            present = self._enter(interval, x, slope)
        else:
            if present is None:  # AFS spares the first node its evaluation
                present = self._enter(interval, x, analytical_slope(x, self.nodes[0]))
            present.slopes.append(slope)
        if len(present.slopes) < self.solver_table.num_points:
            result = present.points[:, len(present.slopes)]
        else:
            slopes = torch.stack(present.slopes, 1)
            result = present.steps.arrive(present.number, present.x, present.points, slopes)
        self._interval, self._step_index = present, index + 1
        output = result.to(sample.dtype), (here - sigma * slope).to(sample.dtype)
        return EPDSchedulerOutput(*output) if return_dict else output

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """data + sigma noise at `timesteps [B]` or `[1]`, which need not be entries of `timesteps`."""
        times = timesteps.cpu()
        sigma = self.noise.level(times)
        if self.plan.afs:  # the sample before the first evaluation is still at the node
            sigma = torch.where(times == self.timesteps[0].cpu(), self.nodes[0], sigma)
        return original_samples + noise * sigma.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # The state of a run.

    def _index(self, timestep: float | Tensor) -> int:
        """Index of the present evaluation; the first call of a run finds it out by begin index or timestep."""
        if self._step_index is None:
            begin = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            if begin > 0 and self._place(begin)[1] != 0:
                raise SolverError(
                    f"a run begins at the first of the {self.order} evaluations of an interval, not at evaluation "
                    f"{begin}; tables with AFS have that of their first interval left out"
                )
            self._step_index = begin
        if self._step_index >= len(self.levels):
            raise SolverError(f"all {len(self.levels)} evaluations are done; call set_timesteps to begin anew")
        return self._step_index

    def _place(self, index: int) -> tuple[int, int]:
        """(interval, 0 for its node and k for its k-th point) of an evaluation."""
        return divmod(index + int(self.plan.afs), self.order)

    def _evaluated(self, sample: Tensor, index: int) -> Tensor:
        """Where the network is evaluated, given the sample before: with AFS the first time beyond it, at a point."""
        if index > 0 or not self.plan.afs:
            return sample
        return self.steps(sample[:1]).reach(0, sample, analytical_slope(sample, self.nodes[0]))[:, 0]

    def _enter(self, interval: int, x: Tensor, slope: Tensor) -> _Interval:
        """The beginning of an interval, with the state and slope at its node."""
        last = self._interval
        steps, number = (self.steps(x, interval), 0) if last is None else (last.steps, last.number + 1)
        return _Interval(steps, number, x, steps.reach(number, x, slope))
