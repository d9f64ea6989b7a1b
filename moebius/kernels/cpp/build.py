"""Building and loading the C++: once for each processor, compiler and version of torch."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

DTYPES = (torch.float32, torch.bfloat16)
"""of tensors; sums are in fp32"""
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp-simd")
MATH = ("-fno-math-errno", "-fno-trapping-math")
"""neither is looked at; NaN and infinities keep their meaning, unlike by -ffast-math"""
SECONDS = 120
"""for a compiler; it takes some"""


@cache
def load() -> str | None:
    """Make `torch.ops.moebius_cpp` available; else why it cannot be.

    What was built is kept in `$XDG_CACHE_HOME/moebius` or `~/.cache/moebius`. A process that is
    killed while it builds leaves nothing that others would wait for or take.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or _compiler()
        if not compiler or shutil.which(compiler[0]) is None:
            return "there is no C++ compiler"
        _load((*compiler, *FLAGS, *MATH))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        told = next((line for line in lines if "error" in line), "".join(lines[-1:]))
        return f"{shlex.join(compiler)} does not build them: {told}"
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        return f"they cannot be built: {' '.join(str(error).split())}"
    return None


def _compiler() -> list[str]:
    return list(filter(shutil.which, COMPILERS))[:1]


def _load(command: tuple[str, ...]) -> None:
    """Build what is not there yet, and once more what is there and cannot be loaded."""
    path = _folder() / f"cpp-{_key(command)}.so"
    if path.exists():
        try:
            torch.ops.load_library(path)
            return
        except OSError:
            path.unlink(missing_ok=True)
    _build(command, path)
    torch.ops.load_library(path)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moebius"


def _key(command: tuple[str, ...]) -> str:
    """Of what the result depends on. A home may be shared by machines with other processors."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    compiler = os.path.realpath(shutil.which(command[0]) or "")  # its name has the version
    machine = (torch.__version__, platform.machine(), *platform.libc_ver(), processor, compiler)
    parts = (*command, *machine, *(source.read_text() for source in (*SOURCES, *HEADERS)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(command: tuple[str, ...], path: Path) -> None:
    """Compile to a file of this process's own, and put it in place in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    libraries = (f"-I{home / 'include'}", f"-L{home / 'lib'}", "-ltorch_cpu")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [*command, "-x", "c++", "-", "-o", str(built), *libraries],
            input="".join(f'#include "{source}"\n' for source in SOURCES),  # headers are read once
            env=os.environ | {"LC_ALL": "C"},
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
        built.replace(path)
