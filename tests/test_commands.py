"""All commands of the project on the command line: help, version, exit codes, what goes to stdout, documentation."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from tests.text_files import fault
from torch_utils.errors import user_errors
from torch_utils.options import Command, command
from torch_utils.resources import PRESETS, preset_file, shipped_file
from torch_utils.version import VERSION
from training.commands.config_reference import comments_of, reference

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCORERS = ("hps", "clip", "aesthetic", "pick", "imagereward", "mps", "emoji")
INSTALLED = {name: target.removesuffix(":main") for name, target in PROJECT["scripts"].items()}
MODULES = sorted(
    {
        *INSTALLED.values(),
        *(f"training.ppo.scripts.score_{name}" for name in SCORERS),
        "training.commands.config_reference",
    }
)


def main_of(module: str) -> Command:
    return importlib.import_module(module).main


@pytest.mark.parametrize("module", MODULES)
def test_help_is_complete(module):
    result = CliRunner().invoke(main_of(module), ["--help"], prog_name=module)
    assert result.exit_code == 0 and not result.stderr
    assert "Example" in result.stdout and re.search(r"^ +(python|torchrun) \S", result.stdout, re.MULTILINE)
    assert "Exit codes: 0" in result.stdout and "130" in result.stdout
    assert "General:" in result.stdout
    context = main_of(module).make_context(module, [], resilient_parsing=True)
    for parameter in main_of(module).params:
        if isinstance(parameter, click.Option):
            _, text = parameter.get_help_record(context)
            assert parameter.help, f"{module} {parameter.opts[0]} has no help"
            if isinstance(parameter.default, str | int | float | Path) and not parameter.is_flag:
                assert "default: " in text or "required" in text, f"{module} {parameter.opts[0]} shows no default"


@pytest.mark.parametrize("module", MODULES)
def test_every_option_has_a_heading(module):
    made = main_of(module)
    under = {name for names in made.groups.values() for name in names}
    others = {parameter.name for parameter in made.params if isinstance(parameter, click.Option)} - under
    assert others <= {"version"}, f"{module}: {others} under no heading"


@pytest.mark.parametrize("module", MODULES)
def test_version(module):
    result = CliRunner().invoke(main_of(module), ["--version"])
    if module.endswith("score_hps"):  # whose --version chooses that of HPSv2
        assert result.exit_code == 2
    else:
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"epd-rdpo {VERSION}\n", "")


@pytest.mark.parametrize("module", MODULES)
def test_mistakes_are_told_on_stderr(module):
    result = CliRunner().invoke(main_of(module), ["--no-such-option"])
    assert result.exit_code == 2
    assert result.stdout == "" and "No such option" in result.stderr


@pytest.mark.parametrize("module", MODULES)
def test_help_takes_less_than_two_seconds_of_a_core(module):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = f"from {module} import main; main(['--help'])"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_scripts_in_the_root_folder_are_the_installed_commands():
    for script in ("sample", "sample_baseline", "fake_train"):
        assert importlib.import_module(script).main is main_of(f"training.commands.{script}")


def test_options_come_under_their_headings():
    @command({"Colour": ("shade",)}, help="Paint.")
    @click.option("--shade", help="How dark, 0 to 1", default=0.5)
    @click.option("--size", help="In pixels", default=3)
    def paint(shade: float, size: int) -> None:
        click.echo(f"{shade} {size}")

    lines = [line.split("  ")[0:3] for line in CliRunner().invoke(paint, ["--help"]).stdout.splitlines()]
    named = [line[0] or line[1] for line in lines if any(line)]
    assert named.index("Colour:") < named.index("--shade FLOAT") < named.index("General:")
    assert named.index("General:") < named.index("--size INTEGER") < named.index("--version")
    assert CliRunner().invoke(paint, ["--size", "4"]).stdout == "0.5 4\n"


def test_ctrl_c_has_its_exit_code():
    @click.command()
    @user_errors
    def wait() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(wait)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted\n")


def test_all_commands_are_documented():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    for name, module in INSTALLED.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        script = module.removeprefix("training.commands.")
        assert f"python -m {module}`" in line or f"python {script}.py`" in line
    for scorer in SCORERS:
        assert f"score_{scorer}`" in page


@pytest.mark.parametrize("name", ["epd-train", "epd-sample"])
def test_completion_as_documented(name):
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    assert f'eval "$({variable}=bash_source {name})"' in page
    module = INSTALLED[name]
    program = f"from {module} import main; main(prog_name={name!r})"
    environment = {variable: "bash_complete", "COMP_WORDS": f"{name} --dev", "COMP_CWORD": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "plain,--device\n", result.stderr


def test_presets_and_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preset_file(Path("embedded")) == PRESETS / "embedded.yaml"
    assert preset_file(Path("other")) == Path("other")
    assert preset_file(Path("cfgs/embedded")) == Path("cfgs/embedded")
    prompts = Path("src/prompts/emoji_test.txt")
    assert shipped_file(prompts).is_file() and shipped_file(prompts).is_absolute()
    for other in ("src/prompts/none.txt", "src/../pyproject.toml", "prompts/emoji_test.txt", "src/" + "x" * 300):
        assert shipped_file(Path(other)) == Path(other)
    # What lies in the working directory goes first.
    Path("embedded").write_text("{}")
    prompts.parent.mkdir(parents=True)
    prompts.write_text("mine\n")
    assert preset_file(Path("embedded")) == Path("embedded") and shipped_file(prompts) == prompts


def test_the_configuration_reference_is_up_to_date():
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    made = "python -m training.commands.config_reference --output docs/configuration.md"
    assert written == reference(), f"run: {made}"
    assert made in written


def test_every_key_of_the_configuration_has_a_meaning():
    comments = comments_of((ROOT / "training/ppo/config.py").read_text(encoding="utf-8"))
    keys = {key: text for key, text in comments.items() if key[0] != "Config"}
    assert len(keys) > 60
    assert not [key for key, text in keys.items() if not text]


def test_comments_are_found_behind_and_above_a_field():
    source = (
        "class A:\n    a: int = 1  # behind\n    # above, in\n    # two lines\n    b: str = '# none'\n    c: int = 2\n"
    )
    assert comments_of(source) == {("A", "a"): "behind", ("A", "b"): "above, in two lines", ("A", "c"): ""}


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", VERSION, PROJECT["license"])
    addresses = [reference["url"] for reference in citation["references"]]
    assert addresses == ["https://arxiv.org/abs/2507.14797", "https://arxiv.org/abs/2512.22796"]
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_pre_commit_downloads_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        module = re.match(r"python -m (\S+)", hook["entry"])[1]
        assert importlib.util.find_spec(module), f"{hook['id']}: no module {module}"


def test_every_module_is_on_the_map():
    """CONTRIBUTING.md names what it sends people to."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:training|torch_utils|tests|dnnlib|benchmarks)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
    names = {
        target.id
        for node in ast.walk(ast.parse((ROOT / "training/ppo/config.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {"REWARD_NAMES", "BACKBONE_NAMES", "CHOICES", "AT_LEAST", "ABOVE_ZERO"} <= names


@pytest.mark.parametrize(
    ("text", "said"),
    [("a\n", None), ("", None), ("a", "one line break"), ("a\n\n", "one line break"), ("a\nb \nc\n", "line 2")],
)
def test_planted_faults_in_texts_are_found(text, said):
    found = fault(text)
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    "name", ["CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "docs/commands.md", "docs/configuration.md"]
)
def test_texts_are_tidy(name):
    assert fault((ROOT / name).read_text(encoding="utf-8")) is None
