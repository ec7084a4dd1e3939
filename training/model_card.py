"""The model card of a solver table: what people read on the hub."""

from __future__ import annotations

import json
from typing import Any

from solver_utils import NFE
from training.solver_table import SolverTable

PAPERS = ("2507.14797", "2512.22796")  # EPD-Solver, and the reinforcement learning of its tables
TAGS = ("epd", "ode-solver", "stable-diffusion", "text-to-image", *(f"arxiv:{paper}" for paper in PAPERS))


def model_card(
    table: SolverTable, nfe: NFE, base_model: str | None, training: dict[str, Any], repo_id: str | None
) -> str:
    """README.md with YAML front matter; `repo_id` is what its example loads."""
    intervals = table.num_steps - 1
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": list(TAGS)}
    if base_model is not None:
        front["base_model"] = base_model.partition("@")[0]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]  # JSON is YAML
    lines += [
        f"# Solver table: {intervals} steps, {table.num_points} points each",
        "",
        "A learned table for [EPD-Solver](https://arxiv.org/abs/2507.14797): at which noise levels the network is",
        "evaluated in parallel within each sampling step, and how the slopes are averaged. The model stays as it is.",
        "",
        f"{nfe.parallel_nfe} sequential network calls and {nfe.nfe} evaluations make an image, at guidance",
        f"{table.guidance_rate:g}, for which the table was made.",
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        "from training.diffusers_plugin import apply_epd",
        "",
        f"pipe = StableDiffusionPipeline.from_pretrained({json.dumps(base_model or 'path/to/the/model')})",
        f"pipe = apply_epd(pipe, {json.dumps(repo_id or 'path/to/this/folder')})",
        'image = pipe("a red bicycle").images[0]',
        "```",
        "",
        "## How it was made",
        "",
        *([f"- {name}: `{value}`" for name, value in training.items()] or ["Not recorded."]),
        "",
        "## Numbers",
        "",
        f"Solver `{table.sampler_stu}`, schedule `{table.schedule_type}`, rho {table.schedule_rho:g}, AFS "
        f"{'on' if table.afs else 'off'}. Every bit is in `epd_table.safetensors`; here rounded, the points of a step",
        "beside each other:",
        "",
        "| step | position | weight | scale of the slope | scale of the noise level |",
        "|---:|---|---|---|---|",
    ]
    for i in range(intervals):
        columns = (table.positions, table.weights, table.scale_dir, table.scale_time)
        numbers = (", ".join(f"{value:.4f}" for value in column[i].tolist()) for column in columns)
        lines.append(f"| {i + 1} | {' | '.join(numbers)} |")
    return "\n".join([*lines, ""])
