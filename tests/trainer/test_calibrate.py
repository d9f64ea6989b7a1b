"""Profiles of this machine, as the planner reads them."""

import json
from pathlib import Path

import pytest

from moebius.parallel.planner.device import DeviceProfile, device_profile
from tests.faults.restarts import attempt

pytestmark = pytest.mark.usefixtures("warm")
SHORT = ["--device=cpu", "--seconds=0.1"]


def checked(path: Path) -> DeviceProfile:
    profile = device_profile(str(path))
    assert profile.kind == "cpu"
    assert profile.efficiency == 1, "the rates are those of a model's products"
    assert profile.source.startswith("measured on ")
    # A hundredth and a thousandfold of any core: units are right.
    assert 1e8 < profile.flops_fp32 < 1e13
    assert 1e7 < profile.flops_bf16 < 1e13
    assert 1e8 < profile.memory_bandwidth < 1e13
    return profile


def test_one_process_measures_all_but_links(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "mine.json"
    done = attempt(["calibrate", "--out", str(path), *SHORT], 1, 0, tmp_path / "log")
    assert done.succeeded, done.output
    profile = checked(path)
    assert (profile.name, profile.devices_per_node) == ("mine", 1)
    assert "link node assumed; link network assumed" in profile.source
    assert "link within a node: not measured, assumed" in done.output
    assert f"moebius plan CONFIG --device {path}" in done.output


def test_two_processes_measure_the_link_between_them(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    done = attempt(
        ["calibrate", "--out", str(path), "--name", "pair", *SHORT], 2, 0, tmp_path / "log"
    )
    assert done.succeeded, done.output
    profile = checked(path)
    assert (profile.name, profile.devices_per_node) == ("pair", 2)
    assert profile.source.endswith("2 processes at the same time; link network assumed")
    assert profile.node.bandwidth > 1e6
    assert 0 < profile.node.latency < 1
    one = json.loads(path.read_text())
    assert one["network"] == {"bandwidth": 1e9, "latency": 1e-4}, "what is assumed"
    assert done.output.count("written: ") == 1
