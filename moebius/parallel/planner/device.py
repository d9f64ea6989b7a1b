"""Machines to plan for: what a device computes, holds and sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, ValidationError

from moebius.config import ConfigNode
from moebius.errors import ConfigError

GIGA = 1e9


class Link(ConfigNode):
    """What connects devices."""

    bandwidth: PositiveFloat
    """bytes per second that a device sends while it receives as many"""
    latency: PositiveFloat
    """seconds until the first byte arrives"""


class DeviceProfile(ConfigNode):
    """A kind of device and the machines that it comes in. Written by `moebius calibrate`."""

    name: str
    kind: Literal["cpu", "cuda"]
    source: str
    """where the numbers come from: `data sheet`, or where and when they were measured"""
    devices_per_node: PositiveInt
    """of a CPU, processes"""
    memory: PositiveFloat
    """bytes of a device"""
    memory_bandwidth: PositiveFloat
    """bytes per second, read and written together"""
    flops_fp32: PositiveFloat
    """per second, in products of fp32"""
    flops_bf16: PositiveFloat
    """per second, in products of bf16 with sums in fp32"""
    efficiency: PositiveFloat
    """share of `flops_*` that the products of a model reach; 1 where they were measured so"""
    node: Link
    """between devices of a node"""
    network: Link
    """between devices of different nodes"""
    mean_hours_between_failures: PositiveFloat = 50_000.0
    """of one device with its share of the node and the network"""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(self.model_dump(), indent=1) + "\n")


def _of_data_sheet(
    name: str,
    gigabytes: float,
    terabytes_per_second: float,
    teraflops_fp32: float,
    teraflops_bf16: float,
    node_gigabytes_per_second: float,
    network_gigabits_per_second: float,
) -> DeviceProfile:
    return DeviceProfile(
        name=name,
        kind="cuda",
        source="data sheet",
        devices_per_node=8,
        memory=gigabytes * GIGA,
        memory_bandwidth=terabytes_per_second * 1e12,
        flops_fp32=teraflops_fp32 * 1e12,
        flops_bf16=teraflops_bf16 * 1e12,
        efficiency=0.5,  # an assumption: nothing has been measured on these devices yet
        node=Link(bandwidth=node_gigabytes_per_second * GIGA, latency=1e-5),
        network=Link(bandwidth=network_gigabits_per_second / 8 * GIGA, latency=2e-5),
    )


def known_profiles() -> dict[str, DeviceProfile]:
    """By name. Dense rates of the SXM modules, in nodes of eight with a network card each."""
    found = [
        _of_data_sheet("a100", 80, 2.039, 19.5, 312, 300, 200),
        _of_data_sheet("h100", 80, 3.35, 67, 989, 450, 400),
        _of_data_sheet("h200", 141, 4.8, 67, 989, 450, 400),
        _of_data_sheet("b200", 180, 8.0, 75, 2250, 900, 400),
        DeviceProfile(
            name="cpu",
            kind="cpu",
            source="assumed: one core with AVX-512 of a server, see moebius calibrate",
            devices_per_node=2,
            memory=8 * GIGA,
            memory_bandwidth=4e10,
            flops_fp32=1e11,
            flops_bf16=2e11,
            efficiency=0.7,
            node=Link(bandwidth=1e9, latency=1e-4),
            network=Link(bandwidth=1e9, latency=1e-4),
        ),
    ]
    return {profile.name: profile for profile in found}


def device_profile(name: str) -> DeviceProfile:
    """A known device by name, or the profile in a file.

    Raises ConfigError where there is no such device, or the file is no profile.
    """
    known = known_profiles()
    if name in known:
        return known[name]
    path = Path(name)
    allowed = f"allowed: {', '.join(known)}, or a file"
    if not path.is_file():
        raise ConfigError(f"--device: '{name}'; {allowed}", "moebius calibrate writes such a file")
    try:
        return DeviceProfile.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*(str(key) for key in first["loc"]), first["msg"]])
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error)
    raise ConfigError(
        f"--device: '{name}' is no device profile: {reason}", "moebius calibrate writes one"
    )
