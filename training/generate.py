"""From prompts and seeds to images: the one generation core of rollouts, `sample.py` and `sample_baseline.py`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from solver_utils import (
    NFE,
    SOLVER_OPTIONS,
    SolverError,
    check_options,
    check_schedule,
    count_nfe,
    default_rho,
    explicit_schedule,
    get_schedule,
)
from solvers import SOLVERS
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.seeds import noise
from training.denoisers import (
    Denoiser,
    TextCond,
    check_model,
    check_model_schedule,
    create_model,
    find_model,
    note_resolution,
)
from training.images import image_grid, quantize, save_png
from training.manifest import GRID, Manifest, image_name
from training.table import SolverTable
from training.table_facts import TABLE_SOLVERS, time_shift

Sampler = Callable[[Denoiser, Tensor, Tensor, TextCond], Tensor]
GRID_IMAGES = 64
EXPLICIT = "explicit"  # the schedule type of nodes given one by one
SIGMA_MAX_MARGIN = 1.001  # how far beyond the model's sigma_max a rounded first node may lie


class HasNoiseLevels(Protocol):
    """What schedules ask of a `Denoiser`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def is_flow(self) -> bool: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def sigma_inv(self, sigma: Tensor) -> Tensor: ...


def table_schedule(made_for: SolverTable | SamplingPlan, net: HasNoiseLevels) -> Tensor:
    """Nodes that a table or plan is made for, float64 `[num_steps]`; a range that it leaves open is the model's."""
    sigma_min = net.sigma_min if made_for.sigma_min is None else made_for.sigma_min
    sigma_max = net.sigma_max if made_for.sigma_max is None else made_for.sigma_max
    shift, mu = time_shift(made_for)
    _check_first(sigma_max, net)
    return get_schedule(
        made_for.num_steps,
        sigma_min,
        sigma_max,
        net.device,
        made_for.schedule_type,
        made_for.schedule_rho,  # type: ignore[arg-type]  # None only with explicit nodes
        net,
        shift=shift,
        mu=mu,
    )


def _check_first(sigma: float, net: HasNoiseLevels) -> None:
    """Raise SolverError for a first node beyond the noise levels that the model was trained on."""
    if sigma > (1.0 if net.is_flow else SIGMA_MAX_MARGIN * net.sigma_max):
        raise SolverError(
            f"the schedule begins at sigma {sigma:g}, beyond the model's noise levels, which end at {net.sigma_max:g}"
        )


@torch.no_grad()
def generate_batch(net: Denoiser, prompts: list[str], seeds: list[int], sampler: Sampler, sigmas: Tensor) -> Tensor:
    """One image per (prompt, seed): float32 `[B, 3, H, W]` in [0, 1] on the 8-bit grid, on the net's device.

    The noise of an image comes from its seed alone; `sampler(net, x, sigmas, cond)` returns the final state.
    """
    x, cond = initial_latents(net, prompts, seeds, sigmas)
    return quantize(net.decode(sampler(net, x, sigmas, cond)))


def initial_latents(net: Denoiser, prompts: list[str], seeds: list[int], sigmas: Tensor) -> tuple[Tensor, TextCond]:
    """The state `[B, C, h, w]` at `sigmas[0]` that each seed stands for, and the condition of the prompts."""
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    return net.initial_state(noise(seeds, shape).to(net.device), sigmas[0]), net.encode_prompts(prompts)


@dataclass(frozen=True)
class SamplingPlan:
    """Everything that decides what an image of (prompt, seed) looks like."""

    solver: str  # a key of solvers.SOLVERS
    num_steps: int  # nodes; a node 0 that `to_zero` appends is not counted
    schedule_type: str  # of solver_utils.SCHEDULE_TYPES, or EXPLICIT with `sigmas_list`
    schedule_rho: float | None  # None: of EXPLICIT
    options: dict[str, float | str] = field(default_factory=dict)  # of the solver, beside its table and `max_rows`
    table: SolverTable | None = None
    sigma_min: float | None = None  # None: the model's
    sigma_max: float | None = None
    flowmatch_shift: float | None = None
    flowmatch_mu: float | None = None
    sigmas_list: tuple[float, ...] | None = None  # of EXPLICIT: all `num_steps` nodes
    to_zero: bool = False  # a node 0 follows the schedule
    afs: bool = False
    dataset_name: str = "ms_coco"
    guidance_type: str = "cfg"
    guidance_rate: float = 7.5
    model_path: str | None = None
    precision: str = "float32"

    @classmethod
    def of_table(cls, table: SolverTable, model_path: str | None, precision: str) -> SamplingPlan:
        """Sampling with an EPD table, by its solver and under the conditions that it was made for."""
        solver = TABLE_SOLVERS[table.sampler_stu]
        named = {name: value for name, value in table.metadata().items() if name in SOLVER_OPTIONS[solver]}
        shift, mu = time_shift(table)
        return cls(
            solver=solver,
            options={name: value for name, value in named.items() if value is not None},
            num_steps=table.num_steps,
            schedule_type=table.schedule_type,
            schedule_rho=table.schedule_rho,
            table=table,
            sigma_min=table.sigma_min,
            sigma_max=table.sigma_max,
            flowmatch_shift=shift,
            flowmatch_mu=mu,
            afs=table.afs,
            dataset_name=table.dataset_name,
            guidance_type=table.guidance_type,
            guidance_rate=table.guidance_rate,
            model_path=model_path,
            precision=precision,
        )

    def check(self) -> None:
        """Raise a `UserError` subclass for what cannot work, before any model loads."""
        check_options(self.solver, self.options)
        self.nfe()
        if self.table is not None and self.table.is_batched:
            raise SolverError(f"sampling takes one table, not {len(self.table.positions)}; pick one of them")
        check_model(self.dataset_name, self.guidance_type, self.guidance_rate, self.model_path, self.precision)
        nodes = self.nodes()
        if nodes is not None:
            explicit_schedule(nodes)
            given = len(nodes) - self.to_zero
            if (self.schedule_type, self.num_steps) != (EXPLICIT, given):
                raise SolverError(
                    f"{given} explicit sigmas do not make a schedule {self.schedule_type} of {self.num_steps} nodes"
                )
            return
        check_schedule(
            self.schedule_type,
            self.num_steps,
            self.sigma_min,
            self.sigma_max,
            self.schedule_rho,  # type: ignore[arg-type]  # None only with explicit nodes
            self.flowmatch_shift,
            self.flowmatch_mu,
        )
        check_model_schedule(self.dataset_name, self.schedule_type)

    def nfe(self) -> NFE:
        """Evaluations that one image costs."""
        points = self.table.num_points if self.table else 1
        guided = self.guidance_rate != 1
        return count_nfe(self.solver, self.num_steps, points, guided, self.afs, to_zero=self.to_zero, **self.options)

    def load_model(self, device: torch.device, compile_mode: str = "off") -> Denoiser:
        model = self.dataset_name, self.guidance_type, self.guidance_rate
        return create_model(*model, device, self.model_path, self.precision, compile_mode)

    def nodes(self) -> list[float] | None:
        """`sigmas_list` with a last 0 where `to_zero` asks for it; None for schedules that need the model's range."""
        return None if self.sigmas_list is None else [*self.sigmas_list, *[0.0] * self.to_zero]

    def sigmas(self, net: HasNoiseLevels) -> Tensor:
        """Nodes of the run: float64, with a last 0 where `to_zero` asks for it. Raises SolverError."""
        given = self.nodes()
        if given is None:
            nodes = table_schedule(self, net)
            return torch.cat([nodes, nodes.new_zeros(1)]) if self.to_zero else nodes
        _check_first(given[0], net)
        return explicit_schedule(given, net.device)

    def sampler(self, seeds: Sequence[int], max_rows: int | None = None) -> Sampler:
        """The solver with its options; noise that it draws on the way comes from the image's seed too.

        `max_rows`, of solvers with a table, limits the rows of a network call and changes no image.
        """
        options: dict[str, object] = dict(self.options)
        if self.table is not None:
            options |= {"table": self.table, "max_rows": max_rows}
        if self.solver == "edm":
            draws = iter(range(self.num_steps))

            def randn_like(x: Tensor) -> Tensor:
                return noise(seeds, x.shape[1:], f"churn {next(draws)}").to(x)

            options["randn_like"] = randn_like
        return functools.partial(SOLVERS[self.solver], afs=self.afs, **options)

    def record(self) -> dict[str, object]:
        """What every manifest line of this run says."""
        nfe = self.nfe()
        options = SOLVER_OPTIONS[self.solver] | self.options
        return {
            "solver": self.solver,
            # JSON has no infinity, which is the default of s_max.
            "options": {name: value for name, value in options.items() if value is not None and value != math.inf},
            "num_steps": self.num_steps,
            "table_sha256": self.table.sha256() if self.table else None,
            "nfe": nfe.nfe,
            "parallel_nfe": nfe.parallel_nfe,
            "forwards": nfe.forwards,
            "schedule_type": self.schedule_type,
            "schedule_rho": self.schedule_rho,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "flowmatch_shift": self.flowmatch_shift,
            "flowmatch_mu": self.flowmatch_mu,
            "sigmas": self.nodes(),
            "final_zero": self.to_zero,
            "afs": self.afs,
            "dataset_name": self.dataset_name,
            "guidance_rate": self.guidance_rate,
            "model_path": self.model_path,
            "precision": self.precision,
        }

    def default_outdir(self) -> Path:
        """`samples/<model>-<solver>[-<option><value>...]-<schedule>-nfe<NFE>-para<parallel NFE>`.

        Options at their defaults are left out. The schedule is its type and what else decides the nodes, where it is
        not the default: `discrete-sigma_min0.2`, `explicit1f0a9c` (the start of a hash of the list), `polynomial-zero`,
        `logsnr-afs`. Raises SolverError.
        """
        nfe = self.nfe()
        defaults = SOLVER_OPTIONS[self.solver]
        chosen = {name: value for name, value in sorted(self.options.items()) if value != defaults[name]}
        words = [self.dataset_name, self.solver, *(_word(name, value) for name, value in chosen.items())]
        if self.sigmas_list is None:
            has_default_rho = self.schedule_rho == default_rho(self.schedule_type)
            choices = {
                "rho": None if has_default_rho else self.schedule_rho,
                "sigma_min": self.sigma_min,
                "sigma_max": self.sigma_max,
                "shift": self.flowmatch_shift,
                "mu": self.flowmatch_mu,
            }
            words += [self.schedule_type, *(_word(name, value) for name, value in choices.items() if value is not None)]
        else:
            words.append(EXPLICIT + hashlib.sha256(json.dumps(self.nodes()).encode("ascii")).hexdigest()[:6])
        words += ["zero"] * self.to_zero + ["afs"] * self.afs
        return Path("samples") / "-".join([*words, f"nfe{nfe.nfe}", f"para{nfe.parallel_nfe}"])


def _word(name: str, value: float | str) -> str:
    """`max_order2`, `variantbh1`, `no_lower_order_final`: a part of a file name."""
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return name + (value if isinstance(value, str) else f"{value:.12g}".replace("+", ""))


def generate_images(
    net: Denoiser,
    plan: SamplingPlan,
    seeds: Sequence[int],
    prompts: Sequence[str],
    batch: int,
    max_rows: int | None = None,
    compiled: range = range(0),
) -> Iterator[tuple[Sequence[int], Sequence[str], Tensor]]:
    """Yield (seeds, prompts, images `[b, 3, H, W]`), at most `batch` images at a time; see `generate_batch`.

    `max_rows`: see `SamplingPlan.sampler`. `compiled`: the batches, from 0, that may wait for the compiler.
    """
    sigmas = plan.sigmas(net)
    for index, start in enumerate(range(0, len(seeds), batch)):
        net.compile_calls(index in compiled)
        part = slice(start, start + batch)
        sampler = plan.sampler(seeds[part], max_rows)
        yield (
            seeds[part],
            prompts[part],
            generate_batch(net, list(prompts[part]), list(seeds[part]), sampler, sigmas),
        )


def write_images(
    plan: SamplingPlan,
    seeds: Sequence[int],
    prompts: Sequence[str],
    outdir: Path,
    *,
    batch: int,
    device: str,
    max_rows: int | None = None,
    compile_mode: str = "off",
    parallel: str = "images",
    overwrite: bool = False,
    grid: bool = False,
) -> None:
    """Sample `prompts[i]` with `seeds[i]` into `outdir/000000/000123.png` and `outdir/manifest.jsonl`.

    Images that `outdir` already has from an equal plan are kept after a check of their hash; `overwrite` makes them
    anew. A run that goes on makes those that it would have made undisturbed. Under `torchrun` the ranks share out the
    batches or, with `parallel` "points" instead of "images", the rows of every network call. `batch` and `max_rows` (of
    a network call, for plans with a table) only cut up the work, `compile_mode` (see `create_model`) only speeds it up:
    none of these is a part of the plan.
    Raises a `UserError` subclass before anything is written when the plan cannot work or `outdir` holds images of
    another plan.
    """
    prompt_of = dict(zip(seeds, prompts, strict=True))
    if max_rows is not None:
        check_options(plan.solver, {"max_rows": max_rows})
    try:
        with distributed.joined(device):
            if parallel == "points":
                distributed.on_main(lambda: _check_points(plan, batch, max_rows))
            with contextlib.ExitStack() as locks:
                manifest, todo = distributed.on_main(lambda: _prepare(plan, prompt_of, outdir, overwrite, locks))
                distributed.print0(f"{outdir}: {len(todo)} images to make, {len(seeds) - len(todo)} finished before")
                if todo:
                    _generate(plan, manifest, todo, prompt_of, batch, max_rows, compile_mode, parallel, overwrite)
                if grid and distributed.is_main():
                    pictures = torch.stack([manifest.load(seed) for seed in seeds[:GRID_IMAGES]])
                    save_png(image_grid(pictures, columns=min(8, len(pictures))), outdir / GRID)
    except torch.OutOfMemoryError as error:
        advice = "lower --batch"
        if plan.table is not None:
            advice += f", or split the rows of a call with --max-rows (now {max_rows or 'no limit'})"
        raise UserError(
            f"the GPU's memory does not suffice for {batch} images at a time; {advice}. Finished images are kept: "
            "start again with the same folder"
        ) from error


def _prepare(
    plan: SamplingPlan, prompt_of: dict[int, str], outdir: Path, overwrite: bool, locks: contextlib.ExitStack
) -> tuple[Manifest, list[int]]:
    """Check everything that needs no model, then make and lock `outdir`: its manifest and the seeds to make."""
    plan.check()
    manifest = Manifest(outdir, plan.record())
    todo = list(prompt_of) if overwrite else manifest.missing(prompt_of)
    model = find_model(plan.dataset_name, plan.guidance_type, plan.guidance_rate, plan.model_path, plan.precision)
    if plan.table is not None and (note := note_resolution(plan.dataset_name, model, plan.table.img_resolution)):
        distributed.print0(note)
    manifest.open(locks)
    if not todo:
        manifest.begin([])  # the last run may have been cut off between its last image and the joined manifest
    return manifest, todo


def _unfinished(seeds: Sequence[int], todo: set[int], batch: int, takers: int) -> list[int]:
    """This rank's seeds: of the batches that hold any of `todo` every `takers`-th, whole.

    What else is in its batch moves an image's last bits, so the batches are those of all seeds, whatever is finished
    and however many ranks there are.
    """
    batches = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    unfinished = [part for part in batches if not todo.isdisjoint(part)]
    return [seed for part in unfinished[distributed.rank() % takers :: takers] for seed in part]


def _note_idle(images: int, batch: int) -> None:
    """Say so where there are more processes than batches, and smaller batches would change that."""
    ranks = distributed.world_size()
    batches, smaller = math.ceil(images / batch), math.ceil(images / ranks)
    if batches < min(ranks, math.ceil(images / smaller)):
        distributed.print0(
            f"note: {images} images in batches of --batch {batch} leave {ranks - batches} of {ranks} processes without "
            f"work; --batch {smaller} is faster, for the same pictures up to rounding"
        )


def _check_points(plan: SamplingPlan, batch: int, max_rows: int | None) -> None:
    """Raise a `UserError` where spreading the rows of a network call over the ranks cannot help."""
    ranks, hosts = distributed.world_size(), distributed.world_size() // distributed.local_world_size()
    points = plan.table.num_points if plan.table is not None else 1
    branches = 1 if plan.guidance_rate == 1 else 2
    rows = branches * min(batch * points, max_rows or batch * points)
    if ranks == 1:
        raise UserError(
            "--parallel points spreads one image over several GPUs: start it with python -m torch.distributed.run "
            "--standalone --nproc_per_node=2, or leave it out"
        )
    if hosts > 1:
        raise UserError(
            f"--parallel points needs GPUs of one host, not of {hosts}: the ranks meet in every network call"
        )
    if ranks > rows:
        raise UserError(
            f"--parallel points: {ranks} processes, but the largest network call has {rows} rows (guidance branches "
            f"times points times --batch {batch}); start {rows} processes at most, or leave it out"
        )


def _generate(
    plan: SamplingPlan,
    manifest: Manifest,
    todo: list[int],
    prompt_of: dict[int, str],
    batch: int,
    max_rows: int | None,
    compile_mode: str,
    parallel: str,
    overwrite: bool,
) -> None:
    """This rank's share of `todo`; afterwards rank 0 joins the lines of all ranks."""
    from torch_utils.progress import Progress

    seeds, wanted = list(prompt_of), set(todo)
    net = plan.load_model(distributed.device(), compile_mode)
    plan.sigmas(net)  # the last thing that can be refused: only now may an old manifest lose lines
    if distributed.is_main():
        manifest.begin(todo if overwrite else [])
    distributed.barrier()
    if parallel == "points":
        net.share_rows()
        takers, saves = 1, distributed.is_main()  # all ranks end with the same pictures
    else:
        _note_idle(len(seeds), batch)
        takers, saves = distributed.world_size(), True
    mine = _unfinished(seeds, wanted, batch, takers)
    texts_of_mine = [prompt_of[seed] for seed in mine]
    # The same batches whatever the number of ranks, so that these make the same files; but no picture waits for max.
    compiled = range(compile_mode == "max", len(mine) // batch) if len(seeds) >= 2 * batch else range(0)
    count = len(wanted.intersection(mine))
    with (
        manifest.writer(distributed.rank()) as add,
        Progress(f"sampling with {plan.solver}", count, "image", shown=distributed.is_main()) as progress,
    ):
        for part, texts, images in generate_images(net, plan, mine, texts_of_mine, batch, max_rows, compiled):
            for seed, prompt, image in zip(part, texts, images.cpu(), strict=True) if saves else ():
                if seed in wanted:
                    save_png(image, manifest.folder / image_name(seed))
                    add(seed, prompt)
            progress.advance(len(wanted.intersection(part)))
    distributed.barrier()
    if distributed.is_main():
        manifest.join(todo)
        nfe = plan.nfe()
        cost = f"{nfe.parallel_nfe} sequential calls, {nfe.nfe} evaluations, {nfe.forwards} rows each"
        distributed.print0(f"{len(prompt_of)} images by {plan.solver}, {cost}; {manifest.path} describes them")
