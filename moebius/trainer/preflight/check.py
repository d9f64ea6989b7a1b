"""The whole check: facts of every process, gathered, judged and reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch

from moebius.errors import LaunchError
from moebius.parallel.mesh import Mesh
from moebius.parallel.together import from_first, gathered
from moebius.parallel.world import is_main, world_size
from moebius.trainer.commands.train import check_processes
from moebius.trainer.config import RunConfig, settings
from moebius.trainer.cpu import prepare_cpu
from moebius.trainer.machine import AUTOCAST, select_device
from moebius.trainer.preflight import judge
from moebius.trainer.preflight.facts import Facts, facts_of
from moebius.trainer.preflight.limits import Finding, Limits
from moebius.trainer.preflight.measures import (
    measure_clocks,
    measure_links,
    measure_messages,
    measure_products,
)
from moebius.trainer.preflight.places import checkpoint_bytes, look_at, saved_steps, wanted
from moebius.trainer.preflight.report import Report
from moebius.trainer.preflight.roll import Roll, process_group


def check(load: Callable[[], RunConfig], limits: Limits, roll: Roll) -> Report | None:
    """Everything; the report on the main process, None on the others.

    Raises MoebiusError where there is one process; of several, a failure ends all.
    """
    began = perf_counter()
    config, device = _prepare(load, roll)
    with roll.stage("connect"), process_group(roll, device):
        all_facts, everyones = _found(config, device, roll)
        if not is_main():
            return None
        size = checkpoint_bytes(config)
        findings = list(dict.fromkeys(_judged(config, all_facts, everyones, limits, size)))
    return Report(all_facts, findings, limits, size, perf_counter() - began)


def _prepare(load: Callable[[], RunConfig], roll: Roll) -> tuple[RunConfig, torch.device]:
    """What each process does for itself."""
    with roll.stage("run file", alone=True):
        config = load()
        roll.wait = min(roll.wait, config.parallel.timeout)
        check_processes(config, world_size())
    with roll.stage("device", alone=True):
        device = select_device(config.train.device)
        # Of as many, the node on which no GPU is found is the bad one: "cuda" comes first.
        kinds = sorted(roll.everyones("device", device.type), reverse=True)
        expected = judge.most_common(kinds)
        if device.type != expected:  # no collective joins them
            raise LaunchError(
                f"device kind {device.type}; expected: {expected}, as most have", judge.EXCLUDE
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            for _ in prepare_cpu(config.cpu, config.train.precision):
                pass  # training says what holds
    return config, device


def _found(
    config: RunConfig, device: torch.device, roll: Roll
) -> tuple[list[Facts], list[dict[str, object]]]:
    """Facts by rank, and the settings of all, where they differ; a collective call."""
    own = settings(config)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    with roll.stage("facts", alone=True):
        facts = facts_of(device, digest)
    with roll.stage("facts of all"):
        first = gathered(facts)
        differ = len({each.settings for each in first}) > 1
        everyones = gathered(own) if differ else []
    # Nodes that differ in what they run may do different things from here on.
    if differ or any(_errors(first)):
        return first, everyones
    nodes = [[each.rank for each in members] for members in judge.of_nodes(first).values()]
    with roll.stage("products", alone=True):
        measure_products(facts, device, AUTOCAST[config.train.precision] or torch.float32)
    with roll.stage("links"):
        mesh = Mesh(config.parallel, device.type)
        measure_links(facts, mesh, device)
        measure_messages(facts, nodes, device)
    with roll.stage("clocks"):
        clocks = from_first(measure_clocks([members[0] for members in nodes]))
        facts.clock = clocks.get(facts.rank)
    with roll.stage("files"):
        # The same places on all: a failure in one of them must not be waited for.
        facts.places = [look_at(place) for place in wanted(config)]
        return gathered(facts), []


def _errors(all_facts: Sequence[Facts]) -> Iterator[Finding]:
    found = (*judge.judge_versions(all_facts), *judge.judge_devices(all_facts))
    return (finding for finding in found if finding.kind == "error")


def _judged(
    config: RunConfig,
    all_facts: Sequence[Facts],
    everyones: Sequence[dict[str, object]],
    limits: Limits,
    size: int,
) -> Iterator[Finding]:
    yield from judge.judge_versions(all_facts)
    yield from judge.judge_settings(all_facts, everyones)
    yield from judge.judge_devices(all_facts)
    yield from judge.judge_memory(all_facts, _copies(config, size))
    if not all_facts[0].places:  # what is not measured is not judged
        return
    kept = config.checkpoint.keep + config.checkpoint.keep_best
    yield from judge.judge_products(all_facts, limits)
    yield from judge.judge_messages(all_facts, limits)
    yield from judge.judge_links(all_facts, limits)
    yield from judge.judge_clocks(all_facts, limits)
    yield from judge.judge_places(all_facts, limits, size, kept, saved_steps(config))


def _copies(config: RunConfig, size: int) -> float:
    """Bytes that each process keeps on the host while it writes its part of a checkpoint."""
    budget = config.checkpoint.host_gigabytes
    share = size / world_size()
    return share if budget is None else min(share, budget * 1e9)
