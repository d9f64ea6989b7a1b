"""`moebius plan` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moebius.parallel.planner.device import device_profile
from moebius.trainer.cli import main

QUICKSTART = "configs/quickstart.yaml"


def test_prints_memory_traffic_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART, "--gpus", "2", "--device", "cpu", "parallel.data=ddp"]) == 0
    out = capsys.readouterr().out
    for words in ("weights", "activations", "all_reduce", "MFU", "Young-Daly", "assumed: "):
        assert words in out
    assert "fits into the 7.2 GB of a device" in out


def test_numbers_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART, "--gpus", "1", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = found["memory_bytes"]
    assert memory.pop("all") == sum(memory.values())
    assert memory["weights"] >= 4 * found["parameters"]
    assert found["exchanges"] == []
    assert 0 < found["save_seconds"] < found["save_interval_seconds"]
    assert found["fits"]


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    device_profile("cpu").model_copy(update={"memory": 1e6}).write(path)
    assert main(["plan", QUICKSTART, "--gpus", "1", "--device", str(path)]) == 5
    assert "does NOT fit into the 0.0 GB" in capsys.readouterr().out


def test_a_search_ranks_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    """It knows what the optimizer asks for, too."""
    words = ["plan", QUICKSTART, "--gpus", "2", "--device", "cpu", "--search", "optim.muon={}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "layouts of 2 x cpu, simulated" in out
    assert "slower: " in out
    assert "fsdp2 cuts the rows of matrices, and optim.muon needs whole ones" in out
    assert "data=fsdp2" not in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--gpus", "0"], 2, "--gpus: 0; allowed: 1 or more"),
        (["--device", "h800"], 2, "--device: 'h800'; allowed: a100"),
        (["--gpus", "3", "parallel.tp=2"], 5, "does not divide the 3 processes"),
        (["parallel.tp=0"], 2, "parallel.tp"),
        (["parallel.engine=deepspeed"], 5, "parallel.engine: deepspeed is not simulated"),
        (["distillation.teacher=runs/teacher"], 5, "distillation: a teacher, its memory"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", QUICKSTART, *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
