"""The rooms keep their order, and the package stays readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moebius"
ALLOWED = {
    "kernels": set(),
    "model": {"kernels"},
    "data": set(),
    "parallel": {"model", "kernels"},
    "trainer": {"kernels", "model", "data", "parallel"},
}
SHARED = {"errors", "config", "files"}
"""modules at the top of the package, which every room but `kernels` may use"""
KERNELS_MAY = {"torch", "triton", "megablocks", "flash_attn", "moebius", "math", "collections"} | {
    "dataclasses",
    "typing",
    "functools",
    "importlib",
}
"""of the standard library only what describes data, and what finds a backend"""
BUILDER = Path("kernels", "cpp", "build.py")
"""calls a compiler"""


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    may = ALLOWED[room] | {room} | (SHARED if room != "kernels" else set())
    for path in files:
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] == "moebius":
                assert parts[1] in may, f"{path} imports {module}"


def test_kernels_need_torch_only() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        for module in imported_modules(path):
            name = module.split(".")[0]
            is_builder = path.relative_to(PACKAGE) == BUILDER
            assert name in KERNELS_MAY or (is_builder and name in sys.stdlib_module_names), path


def test_there_is_no_other_room() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert rooms == set(ALLOWED)


def test_no_module_level_mutable_state() -> None:
    """Constants are fine; a list or set, or a dict that is not a table of constants, is not."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            assert not isinstance(value, ast.List | ast.Set | ast.ListComp), f"{path}:{node.lineno}"
            if isinstance(value, ast.Call):
                called = ast.unparse(value.func).split(".")[-1]
                assert called not in ("dict", "list", "set", "defaultdict", "deque"), path
            if isinstance(value, ast.Dict):
                assert value.keys, f"{path}:{node.lineno}: an empty dict is a registry to be"


def test_importing_the_package_starts_nothing() -> None:
    """No torch, no process group, no thread at `import moebius`."""
    code = "import moebius, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
