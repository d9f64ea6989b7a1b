"""A real TensorBoard server on a run folder, looked at with a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moebius.trainer.config import RunConfig
from moebius.trainer.pictures import COLD, HOT
from tests.trainer.helpers import train_run

BROWSER = shutil.which("chromium")
SERIES = {"timeseries": (66, 80, 102), "custom_scalars": (255, 112, 67)}
"""page -> colour of a curve of the first run"""
ENOUGH = 1000
"""pixels; a page without curves has some 300 of the colour in the mark of the run, and a cell of a
heat map is many times larger than a letter"""
SECONDS = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server on a folder, once it has read the runs."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + SECONDS
        while not answers(f"{address}data/runs", b"tensorboard"):
            assert time.monotonic() < deadline, "the server does not show the run"
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def answers(address: str, content: bytes) -> bool:
    """Whether a server gives a page with this in it."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return content in answer.read()
    except OSError:
        return False


def screenshot(address: str, folder: Path) -> np.ndarray[Any, Any]:
    """What a browser shows after twenty seconds of its own time, `[height, width, 3]`."""
    assert BROWSER is not None
    path = folder / "page.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'browser'}", "--window-size=1500,1100"]
    options += ["--virtual-time-budget=20000", f"--screenshot={path}", address]
    subprocess.run([BROWSER, *options], check=True, capture_output=True, timeout=2 * SECONDS)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pixels(image: np.ndarray[Any, Any], colour: tuple[float, ...]) -> int:
    """How many have a colour."""
    return int((np.abs(image - np.array(colour)) <= 3).all(axis=-1).sum())


def shown(address: str, colours: list[tuple[float, ...]], folder: Path) -> bool:
    """Whether a page comes to show enough of each colour.

    A server reads its files while it answers and a browser's own time runs ahead of a busy
    machine's, so a page that is not complete is looked at again.
    """
    deadline = time.monotonic() + 2 * SECONDS
    while time.monotonic() < deadline:
        image = screenshot(address, folder)
        if all(pixels(image, colour) > ENOUGH for colour in colours):
            return True
    return False


@pytest.mark.slow
def test_curves_charts_and_heat_maps_are_shown(run_tree: dict[str, Any], tmp_path: Path) -> None:
    if BROWSER is None:
        assert not os.environ.get("MOEBIUS_REQUIRE_BROWSER"), "chromium is not installed"
        pytest.skip("chromium is not installed")
    tree = run_tree | {"log": {"interval": 1, "picture_interval": 2}}
    run = train_run(RunConfig.model_validate(tree))
    with served(run.folder) as address:
        for page, colour in SERIES.items():
            assert shown(f"{address}#{page}", [colour], tmp_path), page
        cells = [tuple(255 * part for part in colour) for colour in (COLD, HOT)]
        assert shown(f"{address}#images", cells, tmp_path)
