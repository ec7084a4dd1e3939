"""Write the reference of the configuration, docs/configuration.md, from training/ppo/config.py."""

from __future__ import annotations

import ast
import inspect
import textwrap
import tokenize
from dataclasses import MISSING, fields, is_dataclass
from io import StringIO
from pathlib import Path

import click

from torch_utils.errors import user_errors
from torch_utils.options import command
from training.ppo import config

HEAD = """# Configuration reference

Every key of a configuration, made from `training/ppo/config.py` by
`python -m training.commands.config_reference --output docs/configuration.md`.
`--override SECTION.KEY=VALUE` changes one on the command line; `--dry-run` prints all
of them as they would be used. `null` is no value.
"""


def comments_of(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> what the source says about a field: the comment behind it, else the lines before it."""
    comments = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# "), not token.line.lstrip().startswith("#")
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            lines: list[str] = []
            line = item.lineno - 1
            while line in comments and not comments[line][1]:
                lines.insert(0, comments[line][0])
                line -= 1
            behind = comments.get(item.end_lineno or item.lineno)
            found[node.name, item.target.id] = " ".join([*lines, *([behind[0]] if behind else [])])
    return found


def limits(key: str) -> list[str]:
    """What a key's values are limited to, in words."""
    if key in config.CHOICES:
        return ["one of " + ", ".join(f"`{choice}`" for choice in config.CHOICES[key])]
    if key in config.AT_LEAST:
        return [f"at least {config.AT_LEAST[key]}"]
    return ["above 0"] if key in config.ABOVE_ZERO else []


def entries(section: str, kind: type, comments: dict[tuple[str, str], str]) -> list[str]:
    """The list of one section's keys."""
    lines = []
    for item in fields(kind):
        key = f"{section}.{item.name}"
        value = [] if item.default is MISSING else item.default
        default = str(value).lower() if isinstance(value, bool) else "null" if value is None else value or repr(value)
        type_name = str(item.type).replace("None", "null")
        facts = ", ".join([f"`{type_name}`", f"default `{default}`", *limits(key)])
        meaning = comments[kind.__name__, item.name].rstrip(".").replace("<", "\\<")
        text = f"- **`{key}`** ({facts}): {meaning}."
        lines += textwrap.wrap(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return lines


def reference() -> str:
    """The whole page, as Markdown."""
    comments = comments_of(inspect.getsource(config))
    lines = [HEAD]
    for section in fields(config.Config):
        kind = section.default_factory
        if not (isinstance(kind, type) and is_dataclass(kind)):
            raise TypeError(f"section {section.name} of Config is no dataclass")
        lines += [f"## {section.name}", "", *entries(section.name, kind, comments), ""]
        if kind is config.RewardConfig:
            lines += [
                "Each of `reward.components`:",
                "",
                *entries("reward.components[]", config.RewardComponent, comments),
                "",
            ]
    return "\n".join(lines)


@command({"Output": ("output",)})
@click.option("--output", help="File to write", metavar="FILE", type=click.Path(path_type=Path), show_default="stdout")
@user_errors
def main(output: Path | None) -> None:
    """Write the reference of all configuration keys, with types, defaults, limits and meanings, as Markdown.

    \b
    Example:
      python -m training.commands.config_reference --output docs/configuration.md
    """
    if output is None:
        click.echo(reference(), nl=False)
    else:
        output.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
