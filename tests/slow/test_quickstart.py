"""The README's first command in a fresh clone with a fresh environment, to its end."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.helpers import REPOSITORY


@pytest.mark.slow
def test_make_quickstart(tmp_path: Path) -> None:
    """Installs, trains, learns, writes text and says how to go on."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    result = subprocess.run(["make", "quickstart"], cwd=clone, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stderr

    run = clone / "runs" / "quickstart"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    untrained, trained = losses[min(losses)], losses[max(losses)]
    assert untrained == pytest.approx(math.log(4096), rel=0.02)
    assert trained <= 0.6 * math.log(4096)

    assert "tensorboard --logdir runs/quickstart/tensorboard" in result.stdout
    assert "resume:   moebius train configs/quickstart.yaml" in result.stdout
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == sorted(losses)

    # make echoes its second command; what follows is the text.
    _, echoed, generated = result.stdout.partition('--prompt "def "\n')
    assert echoed
    assert generated.startswith("def ")
    assert len(re.findall(r"\w+", generated)) > 5

    again = subprocess.run(["make", "quickstart"], cwd=clone, capture_output=True, text=True)
    assert again.returncode == 0
    assert f"continuing after step {max(losses)}" in again.stdout
