"""What comes with the project, in a checkout and installed: prompts, the embedded model, configurations."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `pip install .` puts the checkout's `src` there (setup.py). Looked at first: any package may bring a `src` of its own.
INSTALLED = ROOT / "training" / "resources"
SOURCES = INSTALLED if INSTALLED.is_dir() else ROOT / "src"
PRESETS = ROOT / "training" / "ppo" / "cfgs"


def shipped_file(path: Path) -> Path:
    """`path`; or, where nothing is there and it begins with `src/`, the file of that name that came along.

    So the presets find their prompts whatever folder a command is started in.
    """
    if path.parts[:1] != ("src",) or ".." in path.parts or os.path.lexists(path):
        return path
    shipped = SOURCES.joinpath(*path.parts[1:])
    return shipped if os.path.isfile(shipped) else path


def preset_file(path: Path) -> Path:
    """`path`; or, where nothing is there and it is the name of a preset (`embedded`), that preset's file."""
    if path.parts != (path.name,) or os.path.lexists(path):
        return path
    preset = PRESETS / f"{path}.yaml"
    return preset if os.path.isfile(preset) else path
