"""Every benchmark runs in small and writes what it promises; the numbers then mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.helpers import REPOSITORY

SCRIPTS = {
    "layer": [],
    "step": [],
    "zero_experts": [],
    "recursion": [],
    "head": [],
    "optimizers": [],
    "monitoring": [],
    "planning": [],
    "planned_memory": [],
    "gpu": ["--device", "cpu"],
}
"""options beside --quick and --out"""
ONE_AFTER_THE_OTHER = """
import json, runpy, sys
sys.path.insert(0, "benchmarks")
for name, options in json.loads(sys.argv[1]).items():
    sys.argv = [name, *options]
    runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")
"""
"""in one process: most of such a small run is importing"""
MACHINE = {"commit", "processor", "cpu_capability", "cores", "threads", "python", "torch"}


def run(command: list[str]) -> str:
    """In the repository, on one thread, kernels of Triton not interpreted; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(folder: Path, name: str) -> dict[str, Any]:
    """The result file of a script."""
    (path,) = folder.glob(f"{name}-*-core-cpu*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    assert result.keys() >= MACHINE, name
    return result


def in_each_precision(result: dict[str, Any]) -> list[Any]:
    """What was measured; bf16 is there, too, or it is said that it cannot be."""
    rates = result["product_gflops"]
    assert rates["fp32"] > 0
    if isinstance(rates["bf16"], str):
        assert result["bf16"] == rates["bf16"]
        return [result["fp32"]]
    return [result["fp32"], result["bf16"]]


@pytest.mark.slow
def test_every_benchmark_writes_its_result(tmp_path: Path) -> None:
    options = {name: ["--quick", "--out", str(tmp_path), *extra] for name, extra in SCRIPTS.items()}
    printed = run([sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(options)])
    assert printed.count("median ms") >= 6

    for cases in in_each_precision(read(tmp_path, "layer")):
        assert [case["routing"] for case in cases] == ["balanced", "skewed"]
        assert cases[1]["max_over_mean_load"] > cases[0]["max_over_mean_load"]
        for case in cases:
            assert case["times"].keys() == {"dense", "moe", "floor"}
            assert case["gradient_error"] < 0.05

    for found in in_each_precision(read(tmp_path, "step")):
        same = found["same_flags"]
        names = {"moebius", "dense", "mixtral", "qwen3_moe", "olmoe"}
        assert same["times"].keys() == same["models"].keys() == names
        # Two of the others have norms of queries and keys beside.
        assert same["models"]["mixtral"]["parameters"] == same["models"]["moebius"]["parameters"]

    for sizes in in_each_precision(read(tmp_path, "zero_experts")):
        shares = [case["ffn_share"] for case in sizes[0]["taus"]]
        assert shares == pytest.approx([6 / 10, 4 / 8, 2 / 6, 0.8 / 4.8], abs=1e-4)
        for case in sizes[0]["taus"]:
            expected = case["speed_over_vanilla"] / case["one_over_share"]
            assert case["part_of_one_over_share"] == pytest.approx(expected, rel=1e-2)

    (size,) = read(tmp_path, "recursion")["sizes"]
    assert size["flops_ratio"] < 1
    assert size["time_over_flops"] == pytest.approx(size["time_ratio"] / size["flops_ratio"])

    for found in in_each_precision(read(tmp_path, "head")):
        assert found["loss"]["plain"] == pytest.approx(found["loss"]["chunked"], rel=1e-2)
        assert found["extra_mebibytes"].keys() == found["times"].keys() == found["loss"].keys()

    kept = read(tmp_path, "optimizers")["state_bytes_per_parameter"]
    assert kept["adamw"] == pytest.approx(8, abs=0.1)
    assert 4 < kept["muon"] < 8

    watching = read(tmp_path, "monitoring")
    assert watching["watching"].keys() == watching["chance"].keys() >= {"overhead", "pairs"}

    gpu = read(tmp_path, "gpu")
    for operation, backends in gpu["operations"].items():
        assert all("floor_over_time" in about for about in backends.values()), operation
        assert "triton" not in backends
    steps = gpu["training"][0]["steps"]
    assert {name for name, about in steps.items() if "mfu" in about} == {
        "moebius, torch, balanced",
        "moebius, torch, learned",
        "transformers, mixtral, autocast",
        "transformers, mixtral, all in bf16",
    }


@pytest.mark.slow
def test_the_early_quickstart_reads_the_same_tokens(tmp_path: Path) -> None:
    found = subprocess.run(["git", "cat-file", "-e", "2af2cee"], cwd=REPOSITORY, check=False)
    if found.returncode:
        pytest.skip("the history of this clone does not go back so far")
    run([sys.executable, "benchmarks/quickstart_speed.py", "--quick", "--out", str(tmp_path)])
    result = read(tmp_path, "quickstart_speed")
    assert result["same_tokens"]
    assert result["training_loss"].keys() == {"1", "2", "3"}
    assert result["tokens_per_second"].keys() == {"old", "new"}
    assert abs(result["largest_difference"]) < 0.5
