"""House rules read off the syntax tree of every project file: one direction of imports, and no unsafe constructs."""

from __future__ import annotations

import ast
import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The layering. The first pattern that fits a module decides; a module may import its own layer and those before it,
# except that nobody but a test imports an entry point.
LAYERS = ("base", "parts", "loops", "entry points", "tests")
LAYER_OF = (
    ("tests.*", "tests"),
    ("benchmarks.*", "tests"),
    ("dnnlib*", "base"),
    ("torch_utils*", "base"),
    ("solver_utils", "base"),
    ("training.ppo.scripts.*", "entry points"),
    ("training.generate", "loops"),
    ("training.embedded*", "loops"),
    ("training.diffusers_plugin*", "loops"),
    ("training.commands*", "loops"),
    ("training.table_hub", "loops"),
    ("training.ppo.launch", "loops"),
    ("training.ppo.ppo_trainer", "loops"),
    ("training.ppo.learner", "loops"),
    ("training.ppo.rdpo", "loops"),
    ("training.ppo.pathwise", "loops"),
    ("training.distill", "loops"),
    ("training.ppo.rl_runner", "loops"),
    ("training.ppo.export_epd_predictor", "loops"),
    ("training.ppo.evaluation", "loops"),
    ("training.ppo.report", "entry points"),
    ("training.ppo.report_*", "loops"),
    ("training.table_command", "entry points"),
    ("training.ppo.comparison", "loops"),
    ("training.ppo.comparison_page", "loops"),
    ("training.ppo.score_sets", "loops"),
    ("training.*", "parts"),
    ("training", "parts"),
    ("solvers", "parts"),
    ("HPSv2*", "parts"),
    ("MPS*", "parts"),
    ("*", "entry points"),  # the scripts in the root folder
)
SKIPPED_FOLDERS = {"build", "dist", "exps", "samples", "results", "weights", "shared", "__pycache__"}

UNSAFE_LOADS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pandas.read_pickle",
    "joblib.load",
    "dill.load",
    "dill.loads",
}


def project_files(root: Path) -> dict[str, Path]:
    """Module name -> file, for every Python file outside hidden, output and environment folders."""
    modules = {}
    for folder, names, files in os.walk(root):
        if "pyvenv.cfg" in files:
            names.clear()
            continue
        names[:] = [name for name in names if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                parts = list((Path(folder) / file).relative_to(root).with_suffix("").parts)
                modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = Path(folder) / file
    return modules


def layer(module: str) -> str:
    return next(name for pattern, name in LAYER_OF if fnmatch.fnmatchcase(module, pattern))


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, those inside functions included; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def project_imports(tree: ast.AST, module: str, is_package: bool, modules: Iterable[str]) -> dict[str, int]:
    """Project modules that a module imports -> line: the longest known prefix of each imported name."""
    known = set(modules)
    edges = {}
    for name, line in imported_names(tree, module, is_package):
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name and name != module:
            edges.setdefault(name, line)
    return edges


def direction_faults(module: str, edges: dict[str, int]) -> list[str]:
    own = layer(module)
    faults = []
    for target, line in edges.items():
        other = layer(target)
        if LAYERS.index(other) > LAYERS.index(own):
            faults.append(f"{module}, line {line}: {own} imports {target} ({other})")
        elif other == own == "entry points" and not target.endswith(".scripts"):
            faults.append(f"{module}, line {line}: imports the entry point {target}")
    return faults


def cycles(graph: dict[str, Iterable[str]]) -> list[str]:
    """Every set of modules that import each other in a ring, as "a -> b -> a" (one ring for each closing import)."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in graph.get(module, ()):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """Dotted name of an expression such as `np.load`, import aliases resolved; "" for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = full_name(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def import_aliases(tree: ast.AST) -> dict[str, str]:
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def is_true(call: ast.Call, option: str) -> bool:
    return any(
        word.arg == option and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )


def is_probe(name: str, call: ast.Call) -> bool:
    """Whether a call asks if an attribute exists; walking declared names, `getattr(table, field.name)`, does not."""
    if name == "getattr":
        return len(call.args) != 2 or isinstance(call.args[1], ast.Constant)
    return name == "hasattr"


def construct_faults(tree: ast.AST, is_test: bool) -> list[tuple[int, str]]:
    """(line, fault) of forbidden constructs. Tests may assert, probe, and unpickle what they wrote themselves."""
    aliases = import_aliases(tree)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append((node.lineno, "bare except"))
        elif isinstance(node, ast.Assert) and not is_test:
            faults.append((node.lineno, "assert outside tests"))
        elif isinstance(node, ast.Attribute | ast.Name) and full_name(node, aliases) == "sys.path":
            faults.append((node.lineno, "use of sys.path"))
        elif isinstance(node, ast.Call):
            name = full_name(node.func, aliases)
            if name == "torch.load" and not is_true(node, "weights_only"):
                faults.append((node.lineno, "torch.load without weights_only=True"))
            elif name == "numpy.load" and is_true(node, "allow_pickle"):
                faults.append((node.lineno, "numpy.load with allow_pickle=True"))
            elif name == "site.addsitedir":
                faults.append((node.lineno, "use of sys.path"))
            elif not is_test and name in UNSAFE_LOADS:
                faults.append((node.lineno, f"{name} runs code from the file"))
            elif not is_test and is_probe(name.removeprefix("builtins."), node):
                faults.append((node.lineno, f"attribute probing with {name}"))
    return faults


@pytest.fixture(scope="module")
def project() -> dict[str, tuple[ast.AST, Path]]:
    return {
        module: (ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), path)
        for module, path in project_files(ROOT).items()
    }


@pytest.fixture(scope="module")
def edges(project) -> dict[str, dict[str, int]]:
    return {
        module: project_imports(tree, module, path.name == "__init__.py", project)
        for module, (tree, path) in project.items()
    }


def test_the_walk_reaches_the_project(project, edges):
    assert {"torch_utils.errors", "dnnlib", "training.prompts", "tests.test_imports"} <= set(project)
    assert not [module for module in project if "site-packages" in module]
    assert "torch_utils.checkpoint" in edges["dnnlib.util"]
    assert "dnnlib.util" in edges["torch_utils.download_util"]


def test_imports_point_one_way(edges):
    faults = [fault for module, targets in edges.items() for fault in direction_faults(module, targets)]
    assert not faults, "\n".join(faults)


def test_no_import_cycles(edges):
    found = cycles(edges)
    assert not found, "\n".join(found)


def test_no_forbidden_constructs(project):
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for module, (tree, path) in project.items()
        for line, fault in construct_faults(tree, layer(module) == "tests")
    ]
    assert not faults, "\n".join(faults)


KNOWN = {
    "torch_utils",
    "torch_utils.errors",
    "solvers",
    "sample",
    "fake_train",
    "training",
    "training.table",
    "training.ppo",
    "training.ppo.policy",
    "training.ppo.launch",
    "training.ppo.scripts",
    "training.ppo.scripts.score_hps",
    "benchmarks.closed_form",
}


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("torch_utils.errors", "import solvers", "solvers"),
        ("torch_utils.errors", "def f():\n    from training import table", "training.table"),
        ("training.table", "from .ppo.launch import main", "training.ppo.launch"),
        ("training.ppo.policy", "from .. import ppo\nfrom . import launch", "training.ppo.launch"),
        ("training.ppo.policy", "from benchmarks.closed_form import net", "benchmarks.closed_form"),
        ("training.ppo.launch", "import sample as s", "sample"),
        ("training.ppo.launch", "from training.ppo.scripts.score_hps import x", "training.ppo.scripts.score_hps"),
        ("sample", "from fake_train import main", "fake_train"),
        ("solvers", "try:\n    import training.ppo.launch\nexcept ImportError:\n    pass", "training.ppo.launch"),
    ],
)
def test_planted_upward_imports_are_found(module, source, target):
    (fault,) = direction_faults(module, project_imports(ast.parse(source), module, False, KNOWN))
    assert target in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.ppo.launch", "from training.ppo.policy import A\nfrom training import table\nimport torch"),
        ("training.table", "import torch_utils.errors\nfrom solvers import SOLVERS"),
        ("sample", "from training.ppo.launch import main"),
        ("tests.test_sample", "from sample import main\nimport benchmarks.closed_form"),
    ],
)
def test_downward_imports_pass(module, source):
    edges = project_imports(ast.parse(source), module, False, KNOWN)
    assert edges
    assert direction_faults(module, edges) == []


def test_relative_imports_in_a_package_are_resolved():
    tree = ast.parse("from .policy import A\nfrom ..table import B\nfrom . import launch")
    found = project_imports(tree, "training.ppo", True, KNOWN)
    assert set(found) == {"training.ppo.policy", "training.table", "training.ppo.launch"}


def test_planted_cycles_are_found():
    assert cycles({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b -> c -> b"]
    assert cycles({"a": ["b", "c"], "b": ["c"], "c": ["d"], "d": []}) == []
    assert len(cycles({"a": ["b"], "b": ["a"], "x": ["y"], "y": ["z"], "z": ["x"]})) == 2


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("assert x", "assert outside tests"),
        ("import sys\nsys.path.insert(0, '.')", "use of sys.path"),
        ("import sys as s\ns.path += ['.']", "use of sys.path"),
        ("from sys import path as p\np.append('.')", "use of sys.path"),
        ("import site\nsite.addsitedir('.')", "use of sys.path"),
        ("hasattr(x, 'y')", "probing with hasattr"),
        ("z = getattr(x, 'y', None)", "probing with getattr"),
        ("z = getattr(x, name, None)", "probing with getattr"),
        ("z = getattr(x, 'y')", "probing with getattr"),
        ("import builtins\nbuiltins.getattr(x, 'y')", "probing with builtins.getattr"),
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("from pickle import loads as read\nread(b)", "pickle.loads"),
        ("import pickle as p\np.Unpickler(f).load()", "pickle.Unpickler"),
        ("import torch\ntorch.load(f)", "torch.load without"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without"),
        ("import torch\ntorch.load(f, weights_only=flag)", "torch.load without"),
        ("from torch import load\nload(f)", "torch.load without"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load"),
    ],
)
def test_planted_constructs_are_found(source, fault):
    found = construct_faults(ast.parse(source), is_test=False)
    assert found, source
    assert fault in found[0][1]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
        "import pickle\npickle.dumps(x)\nraise pickle.UnpicklingError",
        "try:\n    f()\nexcept Exception:\n    raise",
        "import os\nos.path.join(a)\nself.path.insert(0)\nx = module.load(f)",
        "import numpy as np\nnp.load(f)",
        "[getattr(table, field.name) for field in fields(table)]",
    ],
)
def test_innocent_constructs_pass(source):
    assert construct_faults(ast.parse(source), is_test=False) == []


def test_tests_may_assert_and_unpickle_but_not_load_unsafely():
    allowed = "import pickle\nassert getattr(x, 'y') == pickle.loads(b)"
    assert construct_faults(ast.parse(allowed), is_test=True) == []
    for source in (
        "import torch\ntorch.load(f)",
        "import sys\nsys.path.append('.')",
        "try:\n    f()\nexcept:\n    pass",
    ):
        assert construct_faults(ast.parse(source), is_test=True)


def test_planted_files_are_walked_and_environments_are_not(tmp_path):
    for name in ("a.py", "pkg/__init__.py", "pkg/sub/b.py", ".venv/c.py", "env/lib/d.py", "exps/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    assert set(project_files(tmp_path)) == {"a", "pkg", "pkg.sub.b"}
