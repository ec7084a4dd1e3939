"""README and docs: every command is run, or says what it needs and parses; links, paths and keys exist.

A comment above a block of commands says why this test does not run it: `<!-- needs a GPU -->`, `weights`, `GPUs and
weights` or `an account`, `<!-- runs until it is stopped -->`, or `<!-- run by FILE -->`, what runs these commands.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from run_folders import only_run
from toy_training import run_toy, write_files

from torch_utils.resources import preset_file
from training.ppo.config import Config, flatten
from training.ppo.export_epd_predictor import export_predictor

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("configuration.md", "learning_tables.md", "scorers.md", "sd15.md", "solvers.md")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in GENERATED),
]
THING = "(a GPU|weights|GPUs and weights|an account)"
NEEDS = re.compile(f"needs {THING}|runs until it is stopped")
RUN_BY = re.compile(r"run by ([\w./]+)")
BLOCK = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "training|torch_utils|docs|tests|src|benchmarks|dnnlib|HPSv2|MPS"
INSTALLED = {
    name: target.removesuffix(":main")
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
}
# Programs of others: not this project's to check.
FOREIGN = ("pip", "venv", "mypy", "ruff", "pytest", "pre-commit", "tensorboard", "wandb", "eval")


@dataclass(frozen=True)
class Block:
    page: str
    mark: str | None
    commands: tuple[str, ...]


def commands_of(text: str) -> tuple[str, ...]:
    """The command lines of a bash block, continued lines joined, comments removed."""
    lines = text.replace("\\\n", " ").splitlines()
    return tuple(
        line for line in (shlex.join(shlex.split(line, comments=True)).replace("'&&'", "&&") for line in lines) if line
    )


def blocks_of(page: str, text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        yield Block(page, match[1], commands_of(match[2]))


def prose_of(text: str) -> str:
    """The text without its blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans_of(text: str) -> list[str]:
    """What stands between backticks in the prose, on one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(prose_of(text))]


PAGE_TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for page, text in PAGE_TEXTS.items() for block in blocks_of(page, text)]


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command of this project; None for a program of others. ValueError: no command."""
    words = list(words)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    program = Path(words.pop(0)).name
    if program in FOREIGN:
        return None
    if program == "bash":
        source = (ROOT / words[0]).read_text(encoding="utf-8")  # OSError: no such script
        if words[0] in ("train.sh", "sample.sh") and not all(
            f"{word} |" in source or f"{word})" in source for word in words[1:]
        ):
            raise ValueError("no such preset")
        return None
    if program == "torchrun":
        while words and words[0].startswith("--"):
            words.pop(0)
        if not words:
            return None
        program = words[0]
    if program in INSTALLED:
        return INSTALLED[program], words[words[:1] == [program] :]
    if words[0] != "-m":
        return words[0].removesuffix(".py"), words[1:]
    return None if words[1] in FOREIGN else (words[1], words[2:])


def fault_of(command: str) -> str | None:
    """What is wrong with a command line; None where it parses and names files and keys that there are."""
    command, _, more = command.partition("&&")
    if more and fault_of(more):
        return fault_of(more)
    try:
        found = module_of(shlex.split(command))
        if found is None or found[1] == ["..."]:
            return None
        module, arguments = found
        main = importlib.import_module("training.table_command" if module == "training.table" else module).main
        if not isinstance(main, click.Command):  # of argparse
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
            return f"{command}: no {unknown}" if unknown else None
        if isinstance(main, click.Group):
            main, arguments = main.commands[arguments[0]], arguments[1:]
        parsed = main.make_context(module, arguments).params
    except (click.ClickException, ImportError, AttributeError, KeyError, ValueError, OSError) as error:
        # Files that a page makes up need not be here.
        return None if str(error).endswith("does not exist.") else f"{command}: {type(error).__name__}: {error}"
    for name in ("config_path", "prompt_file"):
        path = str(parsed.get(name))
        known = path == "None" or re.search("<|^[A-Z]+$", path) or (ROOT / preset_file(Path(path))).is_file()
        if not known:
            return f"{command}: no file {path}"
    for override in parsed.get("overrides", ()):
        if override.partition("=")[0] not in flatten(Config()):
            return f"{command}: no key {override}"
    return None


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for target in LINK.findall(prose_of(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor and path.exists() else []
        if not path.exists() or (anchor and anchor not in map(slug, headings)):
            dead.append(target)
    return dead


def unknown_names(text: str) -> list[str]:
    """Paths and keys between backticks that do not exist."""
    keys = flatten(Config())
    sections = {key.partition(".")[0] for key in keys}
    unknown = []
    for span in spans_of(text):
        if re.fullmatch(rf"({FOLDERS})/[\w./-]+", span) and not (ROOT / span.rstrip("/")).exists():
            unknown.append(span)
        key = re.fullmatch(r"([a-z]+)\.[a-z][a-z0-9_]*(?=(=.*|: .*)?$).*", span)
        name = re.split(r"[=:]", span)[0]
        if key and key[1] in sections and not name.endswith((".py", ".sh", ".yaml", ".jsonl")) and name not in keys:
            unknown.append(span)
    return unknown


@pytest.mark.parametrize("page", PAGE_TEXTS)
def test_commands_parse(page):
    commands = [command for block in BLOCKS if block.page == page for command in block.commands]
    for span in spans_of(PAGE_TEXTS[page]):
        if re.match(r"(python3? (-m )?[\w./]|torchrun --|bash [\w/]+\.sh|epd-[a-z-]+ )", span):
            commands.append(re.sub(r"( \.\.\.)$", "", span))
    faults = [fault for fault in map(fault_of, commands) if fault]
    spans = spans_of(PAGE_TEXTS[page])
    # A mention, `python -m training.distill`, needs no arguments.
    faults = [fault for fault in faults if not ("MissingParameter" in fault and fault.split(": ")[0] in spans)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGE_TEXTS)
def test_links_paths_and_keys_exist(page):
    assert not dead_links(ROOT / page, PAGE_TEXTS[page])
    assert not unknown_names(PAGE_TEXTS[page])


def test_marks_say_what_is_needed_or_who_runs_it():
    for block in BLOCKS:
        if block.mark is None or NEEDS.fullmatch(block.mark):
            continue
        file = RUN_BY.fullmatch(block.mark)
        assert file, f"{block.page}: <!-- {block.mark} -->"
        source = (ROOT / file[1]).read_text(encoding="utf-8")
        named = re.findall(r"epd-[a-z-]+|[\w./]+\.sh\b|\w+\.py|training\.[\w.]+", " ".join(block.commands))
        assert named and all(name in source for name in named), f"{block.page}: {file[1]} has not all of {named}"


@pytest.mark.parametrize(
    "command",
    [
        "python -m training.ppo.lunch --config embedded",
        "python sample.py --predictor-file x --seeds 0 --outdir y",
        "python -m training.ppo.launch --config embeded",
        "python -m training.ppo.launch --config embedded --override ppo.stepps=3",
        "python sample_baseline.py --sampler magic --num-steps 3 --seeds 0 --outdir y",
        "bash trian.sh",
        "bash train.sh sd16",
        "python -m training.table shows x",
    ],
)
def test_planted_faults_in_commands_are_found(command):
    assert fault_of(command) is not None


def test_planted_faults_in_texts_are_found():
    text = "[a](docs/none.md) [b](docs/report.md#no-such-part) `training/none.py` `ppo.stepps` and `ppo.steps=3`"
    assert dead_links(ROOT / "README.md", text) == ["docs/none.md", "docs/report.md#no-such-part"]
    assert unknown_names(text) == ["training/none.py", "ppo.stepps"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The project's files with a run of one step in `exps`, exported; results go there and not to the checkout."""
    root = tmp_path_factory.mktemp("docs")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "exps", "samples", "results", "tests", "docs", "*.egg-info")
    for path in ROOT.iterdir():
        if path.name not in ignored(str(ROOT), [path.name]):
            (root / path.name).symlink_to(path)
    run_toy(write_files(root), "never", ["ppo.steps=1", f"run.output_root={root / 'exps'}"])
    export_predictor(only_run(root).path)
    conditions = ["--dataset-name", "emoji", "--schedule-type", "logsnr", "--num-steps", "6", "--num-points", "2"]
    command = [sys.executable, "fake_train.py", *conditions, "--outdir", "start"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


def run_block(block: Block, root: Path) -> None:
    """Run its commands in `root`, where the run is `exps/<run>` and TABLE is a start table."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = only_run(root).path
    for command in block.commands:
        words = [word.replace("exps/<run>", str(run)) for word in shlex.split(command)]
        words = [word.replace("TABLE", "start/network-snapshot-000000.pkl") for word in words]
        line = " ".join(word if re.fullmatch(r"[\w./*=-]+", word) else shlex.quote(word) for word in words)
        done = subprocess.run(["bash", "-c", line], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.page}: {line}\n{done.stderr}"


RUN_HERE = [block for block in BLOCKS if block.mark is None]


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN_HERE, ids=[f"{block.page}-{i}" for i, block in enumerate(RUN_HERE)])
def test_commands_run(block, checkout):
    run_block(block, checkout)
