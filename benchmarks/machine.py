"""What a result file says about where it was measured, and how it is written."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_BF16 = "not measured: this processor has no products in bf16"


def processor() -> str:
    """Name of the CPU as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def commit() -> str:
    """The commit that is checked out, and whether what is measured differs from it."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "moebius", "configs", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not in a git repository"
    return f"{head} with uncommitted changes" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> dict[str, object]:
    """Hardware, versions and commit."""
    return {
        "commit": commit(),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Of this kind of CPU, for the names of files: what matters most for speed."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return f"{os.cpu_count()}-core-cpu{'-avx512' if wide else ''}"


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16; others emulate it, a hundred times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_rates(seconds: float = 0.5) -> dict[str, object]:
    """GF/s of large square products by precision, measured for so long each."""
    # The trainer takes seconds to import, which processes that only compute need not wait for.
    from moebius.trainer.machine import matmul_flops_per_second

    cpu = torch.device("cpu")
    rates: dict[str, object] = {
        "fp32": round(matmul_flops_per_second(cpu, torch.float32, seconds) / 1e9, 1),
        "bf16": NO_BF16,
    }
    if has_bf16():
        rates["bf16"] = round(matmul_flops_per_second(cpu, torch.bfloat16, seconds) / 1e9, 1)
    return rates


def precisions() -> dict[str, torch.dtype]:
    """Those that are worth measuring on this CPU."""
    return {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16() else {})


def prepare() -> str:
    """Set this process up as a run does by default; what that came to."""
    from moebius.trainer.cpu import CPUConfig, prepare_cpu

    return "; ".join(prepare_cpu(CPUConfig(), "fp32"))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return made


def write_result(
    name: str, result: Mapping[str, object], folder: Path = RESULTS, device: str | None = None
) -> dict[str, object]:
    """Write `<name>-<device>.json` with what this machine is; the whole of it."""
    whole = {**machine(), **result}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{device or cpu_name()}.json"
    target.write_text(json.dumps(whole, indent=1) + "\n")
    return whole
