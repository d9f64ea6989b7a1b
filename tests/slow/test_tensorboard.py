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
"""pixels; a page without curves has some 300 of the colour in the mark of the run"""
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


@pytest.mark.slow
def test_curves_charts_and_heat_maps_are_shown(run_tree: dict[str, Any], tmp_path: Path) -> None:
    if BROWSER is None:
        assert not os.environ.get("MOEBIUS_REQUIRE_BROWSER"), "chromium is not installed"
        pytest.skip("chromium is not installed")
    tree = run_tree | {"log": {"interval": 1, "picture_interval": 2}}
    run = train_run(RunConfig.model_validate(tree))
    with served(run.folder) as address:
        for page, colour in SERIES.items():
            assert pixels(screenshot(f"{address}#{page}", tmp_path), colour) > ENOUGH, page
        images = screenshot(f"{address}#images", tmp_path)
    for colour in (COLD, HOT):  # cells of a heat map, many times larger than a letter
        assert pixels(images, tuple(255 * part for part in colour)) > ENOUGH
