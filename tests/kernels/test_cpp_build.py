"""Building the operations in C++: what is kept, and what is said where they cannot be built."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moebius.kernels.cpp import build
from moebius.kernels.registry import KernelError, choose

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and nothing known of earlier attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.load() == "there is no C++ compiler"
    build.load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert build.load() == "there is no C++ compiler"
    with pytest.raises(KernelError, match=r"there is no C\+\+ compiler") as caught:
        choose({"rope": "cpp"}, CPU, torch.float32)
    assert "install g++" in caught.value.hint


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo 'operations.cpp:1:1: fatal error: no header' >&2; echo more >&2; exit 1"
    name = compiler(tmp_path / "c++", script)
    monkeypatch.setenv("CXX", name)
    said = build.load()
    assert said == f"{name} does not build them: operations.cpp:1:1: fatal error: no header"


def test_what_a_compiler_leaves_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path / "c++", script))
    said = build.load()
    assert said is not None
    assert said.startswith("they cannot be built: ")
    assert "\n" not in said


@pytest.mark.parametrize("name", ["'unbalanced", "/bin/false"])
def test_what_is_no_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", name)
    said = build.load()
    assert said is not None
    assert "\n" not in said


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = build.load()
    assert said is not None
    assert said.startswith("they cannot be built: ")


def test_other_devices_and_precisions() -> None:
    with pytest.raises(KernelError, match="no kernels for device cuda"):
        choose({"rope": "cpp"}, torch.device("cuda"), torch.float32)
    with pytest.raises(KernelError, match="no kernels for float64"):
        choose({"rope": "cpp"}, CPU, torch.float64)


LOAD = "from moebius.kernels.cpp import build; print(build.load())"


def test_a_build_that_is_killed_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is built once, and a second process takes it."""
    slow = compiler(tmp_path / "slow", f"touch {tmp_path}/began; sleep 60")
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD], env=os.environ | {"CXX": slow}, start_new_session=True
    )
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    monkeypatch.delenv("CXX", raising=False)
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
        assert done.stdout == "None\n"
    assert len(list((tmp_path / "cache" / "moebius").glob("*.so"))) == 1


def test_what_is_kept_and_cannot_be_loaded_is_built_anew(tmp_path: Path) -> None:
    """A machine that was switched off has left half of it. Processes of their own, for a library
    is loaded once."""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", LOAD], capture_output=True).stdout == b"None\n"
        (kept,) = (tmp_path / "cache" / "moebius").glob("*.so")
        assert kept.stat().st_size > 1000
        kept.write_bytes(b"half")
