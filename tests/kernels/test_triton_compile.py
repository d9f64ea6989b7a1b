"""Every Triton kernel becomes a program for Hopper and Blackwell, on a machine without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SOURCES = Path(__file__).parents[2] / "moebius/kernels/triton"
MODULES = sorted(
    path.stem for path in SOURCES.glob("*.py") if path.stem not in ("__init__", "launch")
)
SHARED_LIMIT = 227 * 1024
"""bytes of shared memory that a block can have on Hopper"""


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_without_spills(module: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.ahead", f"moebius.kernels.triton.{module}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found
    for compiled in found:
        assert compiled["stack"] == 0, compiled
        assert compiled["shared"] <= SHARED_LIMIT, compiled
        assert compiled["tensor_cores"] or not compiled["has_products"], compiled
