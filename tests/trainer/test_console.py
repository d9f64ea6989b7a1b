"""What a person sees in a terminal, in a real one."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

from tests.trainer.helpers import write_config

ROWS, COLUMNS = 40, 100
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def output_in_terminal(config: Path) -> str:
    """All that a training prints in a terminal of its own."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "moebius.trainer", "train", str(config)]
    env = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    pieces = []
    try:
        while piece := os.read(controller, 4096):
            pieces.append(piece)
    except OSError:  # nobody holds the other end any more
        pass
    assert process.wait(timeout=60) == 0, b"".join(pieces).decode()
    os.close(controller)
    return b"".join(pieces).decode()


def test_a_live_view_in_a_terminal(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """A bar and the health of both routings that are redrawn in place; lines of what happened stay,
    and reports are no lines of their own."""
    tree = run_tree | {"log": {"interval": 1}, "checkpoint": {"interval": 4}}
    raw = output_in_terminal(write_config(tree, tmp_path / "run.yaml"))
    assert "\x1b[1A" in raw, "moves up to draw again"
    text = ESCAPES.sub("", raw).replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert all(len(line) <= COLUMNS for line in lines if "tok/s" in line or "━" in line)
    last = [line for line in lines if "━" in line][-1]
    assert re.fullmatch(r"step 6/6 ━+ ETA 0:00:00", last)
    shown = lines[len(lines) - lines[::-1].index(last) :]
    assert re.fullmatch(r"loss [\d.]+ \| [\d,]+ tok/s \| MFU [\d.]+%", shown[0])
    assert re.fullmatch(r"k 2\.0, \d+% ffn, load x[\d.]+, \d+% dead", shown[1])
    assert re.fullmatch(r"depth \d+% causal", shown[2])
    assert re.fullmatch(r"[\d:]+ \| saved: step 6", shown[3])
    for step in (4, 6):
        assert [line for line in lines if line.endswith(f"| saved: step {step}")]
    assert any("validation loss" in line for line in lines)
    assert not any(re.search(r"step +\d/6 \| loss", line) for line in lines)
