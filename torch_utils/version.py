"""The version of this project: `--version` prints it, and pyproject.toml reads it here."""

VERSION = "0.1.0"
