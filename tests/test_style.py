"""The points of the style page that a machine can check (shared/specs/style-models.md, part 2)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("envs", "plasticity", "agents", "continual", "runs")
# A room may import from the rooms below it only; agents and continual stand beside each other.
MAY_IMPORT = {
    "envs": set(),
    "plasticity": set(),
    "agents": {"envs", "plasticity"},
    "continual": {"plasticity"},
    "runs": {"envs", "plasticity", "agents", "continual"},
}
HEAVY = ("avalanche", "dm_control", "warp", "matplotlib", "ray", "gymnasium", "mujoco", "cv2", "tensorboard")
LONGEST_FILE, LONGEST_FUNCTION, DEEPEST_CLASS = 500, 60, 2
# Each pattern with the folders in which it is forbidden ("" = everywhere).
FORBIDDEN = {
    r"\.item\(|\.cpu\(|\bprint\(": ("agents", "continual", "plasticity"),
    r"\bif .*\buse_": ("agents", "continual"),
    r"\bnp\.random\.(?!Generator|SeedSequence|default_rng|PCG64|MT19937|RandomState|BitGenerator)": ("",),
    r"torch\.(rand|randn|randint|randperm)\((?!.*generator=)": ("agents", "continual", "plasticity", "runs", "envs"),
    r"globals\(\)|\bexec\(|weights_only=False|except:\s*$": ("",),
    r"except (Base)?Exception( as \w+)?:\s*pass": ("",),
}

FILES = sorted(path for room in (*ROOMS, "scripts") for path in (ROOT / room).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_keeps_its_size(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(ast.parse(text))}
    assert {f: n for f, n in lengths.items() if n > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_room_imports_only_from_below(path):
    room = path.relative_to(ROOT).parts[0]
    if room == "scripts":
        return
    others = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))} & {*ROOMS, "scripts", "tests"}
    assert others - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_forbidden_pattern(path):
    place = name(path)
    hits = [
        f"{place}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for pattern, folders in FORBIDDEN.items()
        if any(place.startswith(folder) for folder in folders) and re.search(pattern, line)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_public_names_say_what_they_do(path):
    """Modules, public classes and public functions have a docstring; methods of a contract may inherit theirs."""
    tree = ast.parse(path.read_text())
    assert path.name == "__main__.py" or ast.get_docstring(tree), "module"
    wanted = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
    if path.parts[-2] == "scripts":
        wanted = []
    exempt = (
        {"train", "resume", "evaluate", "watch", "report", "list_", "doctor"} if name(path) == "runs/cli.py" else set()
    )
    assert [n.name for n in wanted if not ast.get_docstring(n) and n.name not in exempt] == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_everything_is_annotated(path):
    missing = [
        f"{function.name}({argument.arg})"
        for function in functions(ast.parse(path.read_text()))
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert missing == []


def test_class_trees_are_flat():
    bases: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def depth(cls: str) -> int:
        return 1 + max((depth(base) for base in bases.get(cls, []) if base in bases), default=0)

    assert {cls: depth(cls) for cls in bases if depth(cls) > DEEPEST_CLASS} == {}


def test_rooms_say_what_belongs_there():
    for room in (*ROOMS, "agents/offline", "continual/strategies"):
        assert len((ROOT / room / "__init__.py").read_text().strip()) > 80
    assert not list(ROOT.rglob("utils.py")) or all(".venv" in str(path) for path in ROOT.rglob("utils.py"))


def test_import_of_agents_is_light():
    """Under three seconds of processor time, and none of the heavy libraries."""
    code = "import time; import torch; t = time.process_time(); import agents, agents.td3, agents.dqn, envs, sys; "
    code += f"print(time.process_time() - t, [m for m in {HEAVY} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, _, heavy = ended.stdout.strip().partition(" ")
    assert float(seconds) < 3
    assert heavy == "[]"


def test_documentation_names_only_commands_that_exist():
    """Every `neoteny` line of the README and the docs parses: its flags, agents, presets and environments exist."""
    from runs.cli import COMMANDS
    from runs.continual import prepare as prepare_continual
    from runs.train import prepare

    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    lines = [line.strip() for page in pages for line in page.read_text().splitlines()]
    commands = [line.split("#")[0].split() for line in lines if re.match(r"neoteny \w", line)]
    assert len(commands) >= 5
    for _, command, *arguments in commands:
        assert command in COMMANDS
        if command == "train" and "--from" not in arguments:  # which begins with a run
            prepare(arguments[0], arguments[1:])
        if command == "continual":
            prepare_continual(arguments[0], arguments[1:])
