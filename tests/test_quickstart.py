"""docs/quickstart.ipynb: what is stored in it, and that it runs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/quickstart.ipynb"


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that its cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def distances(notebook: nbformat.NotebookNode) -> tuple[float, float]:
    """How far the pictures before and after are from those of 50 calls."""
    before, after = re.search(r"'before, 10 calls': ([\d.]+), 'after, 10 calls': ([\d.]+)", texts(notebook)).groups()
    return float(before), float(after)


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_what_is_stored_is_small_and_whole():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 600_000
    assert len(pictures(notebook)) == 1
    before, after = distances(notebook)
    assert after < before
    assert str(ROOT) not in texts(notebook) and not re.search(r"(?<![\w.])/(home|root|tmp|usr|work)/", texts(notebook))
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_the_pictures_improve(tmp_path, monkeypatch):
    """From `docs` of a copy, as Jupyter starts it."""
    from nbclient import NotebookClient

    for name in ("training", "torch_utils", "dnnlib", "HPSv2", "MPS", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("solvers.py", "solver_utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "docs")}})
    client.execute()
    before, after = distances(notebook)
    assert after < 0.8 * before
    assert len(pictures(notebook)) == 1
    assert (tmp_path / "exps/quickstart").is_dir()
