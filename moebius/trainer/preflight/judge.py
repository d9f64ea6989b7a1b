"""What facts say about a job, as pure functions of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import median

from moebius.trainer.preflight.facts import Facts
from moebius.trainer.preflight.limits import Finding, Kind, Limits

EXCLUDE = "exclude the node"
FULL = 0.9
"""share of a GPU's memory that nobody else should use"""
SMALL_SHARED_MEMORY = 64 << 20
"""bytes in /dev/shm: NCCL and loaders take some for each process"""
SMALLEST_RING = 4
"""in which one can be told to be slower than its neighbours"""
ONLY_WARNED = frozenset({"driver"})
"""versions that may differ"""


def of_nodes(all_facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Processes by node, in order of their ranks."""
    nodes: dict[str, list[Facts]] = {}
    for facts in all_facts:
        nodes.setdefault(facts.node, []).append(facts)
    return nodes


def most_common(values: Sequence[object]) -> object:
    """What most have; of equally many the first one's."""
    return Counter(values).most_common(1)[0][0]


def _on(kind: Kind, check: str, facts: Facts, text: str) -> Finding:
    return Finding(kind, check, facts.node, facts.rank, text)


def _unlike(kind: Kind, check: str, facts: Facts, text: str, others: int, of: int) -> Finding:
    """One of `others` out of `of` processes that are not as the rest is. Where the rest is no
    majority, nobody knows whose node is to blame."""
    found = _on(kind, check, facts, text)
    if 2 * others < of:
        return found
    text = found.line.replace("as most have", "as others have")
    return Finding(kind, check, None, None, text)


def judge_versions(all_facts: Sequence[Facts]) -> Iterator[Finding]:
    """The same on all nodes; the node that differs from most is named."""
    for name in sorted({name for facts in all_facts for name in facts.versions}):
        expected = most_common([facts.versions.get(name) for facts in all_facts])
        others = [facts for facts in all_facts if facts.versions.get(name) != expected]
        for members in of_nodes(others).values():
            found = members[0].versions.get(name)
            said = f"{name} {found}" if found else f"no {name}"
            yield _unlike(
                "warning" if name in ONLY_WARNED else "error",
                "versions",
                members[0],
                f"{said}; expected: {expected or 'none'}, as most have - install the same "
                "everywhere, or exclude the node",
                len(others),
                len(all_facts),
            )


def judge_settings(
    all_facts: Sequence[Facts], settings: Sequence[dict[str, object]]
) -> Iterator[Finding]:
    """The same settings everywhere; where they differ, `settings` has everyone's, by rank."""
    expected = most_common([facts.settings for facts in all_facts])
    reference = next(facts.rank for facts in all_facts if facts.settings == expected)
    others = [facts for facts in all_facts if facts.settings != expected]
    for members in of_nodes(others).values():
        first = members[0].rank
        own, common = settings[first], settings[reference]
        names = sorted(own.keys() | common.keys())
        name = next(n for n in names if own.get(n) != common.get(n))
        text = f"{name} {own.get(name)}; expected: {common.get(name)}, as most have - "
        text += "give all nodes the same run file"
        yield _unlike("error", "settings", members[0], text, len(others), len(all_facts))


def judge_devices(all_facts: Sequence[Facts]) -> Iterator[Finding]:
    """Alike, each process with its own, and nobody else on it."""
    for name in ("kind", "name", "visible"):
        expected = most_common([getattr(facts.device, name) for facts in all_facts])
        for facts in all_facts:
            found = getattr(facts.device, name)
            if found != expected:
                text = f"device {name} {found}; expected: {expected}, as most have - {EXCLUDE}"
                yield _on("error" if name == "kind" else "warning", "devices", facts, text)
    for node, members in of_nodes(all_facts).items():
        yield from _shared_devices(node, members)
        yield from _cores(node, members)
    for facts in all_facts:
        device = facts.device
        if device.kind == "cuda" and device.free < FULL * device.memory:
            yield _on(
                "warning",
                "devices",
                facts,
                f"{device.free / 1e9:.1f} of {device.memory / 1e9:.1f} GB of its GPU are free; "
                f"expected: {FULL:.0%} - end what else runs there",
            )
        if device.unreachable:
            numbers = ", ".join(map(str, device.unreachable))
            yield _on(
                "warning",
                "devices",
                facts,
                f"no direct access to the memory of GPUs {numbers}; expected: to all of the node - "
                "see `nvidia-smi topo -m`",
            )


def _shared_devices(node: str, members: list[Facts]) -> Iterator[Finding]:
    owners: dict[str, int] = {}
    for facts in members:
        identity = facts.device.identity
        if identity and identity in owners:
            yield _on(
                "error",
                "devices",
                facts,
                f"its GPU {identity} is that of rank {owners[identity]}, too; expected: one for "
                "each process - see CUDA_VISIBLE_DEVICES",
            )
        owners.setdefault(identity, facts.rank)


def _cores(node: str, members: list[Facts]) -> Iterator[Finding]:
    """More threads than cores: of two processes that share some, or of all of a node."""
    pinned = [facts for facts in members if facts.device.kind == "cpu" and facts.device.cores]
    for number, facts in enumerate(pinned):
        for other in pinned[:number]:
            own, theirs = set(facts.device.cores), set(other.device.cores)
            threads = facts.device.threads + other.device.threads
            if own & theirs and threads > len(own | theirs):
                cores = ", ".join(map(str, sorted(own & theirs)[:4]))
                yield _on(
                    "warning",
                    "devices",
                    facts,
                    f"{threads} threads of it and of rank {other.rank} share the cores {cores}; "
                    "expected: a core for each - pin them to other cores, or set cpu.threads",
                )
                return
    allowed = set(chain.from_iterable(facts.device.cores for facts in pinned))
    wanted = sum(facts.device.threads for facts in pinned)
    if wanted > len(allowed):
        yield _on(
            "warning",
            "devices",
            members[0],
            f"{wanted} threads of {len(pinned)} processes on {len(allowed)} cores; expected: a "
            "core for each - set cpu.threads or OMP_NUM_THREADS, or start fewer processes",
        )


def judge_products(all_facts: Sequence[Facts], limits: Limits) -> Iterator[Finding]:
    """No device far below the median."""
    expected = median(facts.flops for facts in all_facts)
    for facts in all_facts:
        if facts.flops < limits.slow_device * expected:
            yield _on(
                "error",
                "products",
                facts,
                f"{facts.flops / 1e9:.1f} GFLOP/s; expected: {limits.slow_device:.2f} of the "
                f"median {expected / 1e9:.1f} GFLOP/s - {EXCLUDE}, or see what else runs there",
            )


def judge_messages(all_facts: Sequence[Facts], limits: Limits) -> Iterator[Finding]:
    """No process that sends far less than the median, within its node or to others."""
    nodes = of_nodes(all_facts)
    for name, where in (("near", "within its node"), ("far", "to other nodes")):
        known: list[tuple[Facts, float]] = []
        for each in all_facts:
            rate, size = getattr(each, name), len(nodes[each.node] if name == "near" else nodes)
            # In a smaller ring everyone is a neighbour of the slow one, and as slow.
            if rate is not None and size >= SMALLEST_RING:
                known.append((each, rate))
        expected = median(rate for _, rate in known) if known else 0.0
        for facts, rate in known:
            if rate < limits.slow_link * expected:
                text = f"sends {rate / 1e9:.2f} GB/s {where}; expected: {limits.slow_link:.2f} of "
                text += f"the median {expected / 1e9:.2f} GB/s - {EXCLUDE}, or see its network"
                yield _on("error", "links", facts, text)


def judge_links(all_facts: Sequence[Facts], limits: Limits) -> Iterator[Finding]:
    """No group far below those of the same axis that span as many nodes."""
    nodes = {facts.rank: facts.node for facts in all_facts}
    groups: dict[tuple[str, int], dict[tuple[int, ...], list[tuple[float, float]]]] = {}
    for facts in all_facts:
        for axis in facts.axes:
            spanned = len({nodes[rank] for rank in axis.ranks})
            members = groups.setdefault((axis.name, spanned), {}).setdefault(axis.ranks, [])
            members.append((axis.all_reduce, axis.all_to_all))
    for (name, _), found in groups.items():
        for number, operation in enumerate(("all-reduce", "all-to-all")):
            rates = {ranks: min(each[number] for each in of) for ranks, of in found.items()}
            expected = median(rates.values())
            for ranks, rate in rates.items():
                if rate < limits.slow_link * expected:
                    yield _slow_group(name, operation, ranks, rate, expected, nodes, limits)


def _slow_group(
    axis: str,
    operation: str,
    ranks: tuple[int, ...],
    rate: float,
    expected: float,
    nodes: dict[int, str],
    limits: Limits,
) -> Finding:
    names = sorted({nodes[rank] for rank in ranks})
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return Finding(
        "error",
        "links",
        names[0] if len(names) == 1 else None,
        ranks[0] if len(names) == 1 else None,
        f"{operation} along {axis} of ranks {shown} on {', '.join(names)}: {rate / 1e9:.2f} GB/s; "
        f"expected: {limits.slow_link:.2f} of the median {expected / 1e9:.2f} GB/s of its groups - "
        "exclude one of the nodes, or see their network",
    )


def judge_places(
    all_facts: Sequence[Facts], limits: Limits, needed: int, kept: int, there: int
) -> Iterator[Finding]:
    """Seen from everywhere, writable, fast and large enough for `kept` checkpoints of `needed`
    bytes and the one that is being written, of which `there` are there."""
    everywhere = set.intersection(*({p.name for p in f.places if p.problem} for f in all_facts))
    for facts in all_facts:
        for place in facts.places:
            said = f"{place.name}: '{place.where}'"
            if place.problem:
                text = f"{said}: {place.problem}; expected: a folder that all nodes may write to - "
                text += f"choose another {place.name}, or make room there"
                if place.name in everywhere:
                    yield Finding("error", "files", None, None, text)
                else:
                    yield _on("error", "files", facts, text)
            elif place.seen_after is None:
                text = f"{said}: a file of rank 0 is not seen; expected: a folder that all nodes "
                yield _on("error", "files", facts, text + "share - mount it, or choose another")
    seconds = save_seconds(all_facts, needed)
    if seconds is not None and seconds > limits.save:
        yield Finding(
            "warning",
            "files",
            None,
            None,
            f"checkpoint.dir: a checkpoint of {needed / 1e9:.2f} GB takes {seconds:.0f} s; "
            f"expected: {limits.save:.0f} s - choose a faster place, or a longer "
            "checkpoint.interval",
        )
    frees = [place.free for place in all_facts[0].places if place.name == "checkpoint.dir"]
    free = next((f for f in frees if f is not None), None)
    room = needed * max(1, kept + 1 - there)
    if free is not None and free < room:
        yield Finding(
            "error",
            "files",
            None,
            None,
            f"checkpoint.dir: {free / 1e9:.2f} GB are free; expected: {room / 1e9:.2f} GB for "
            f"{max(1, kept + 1 - there)} checkpoints of {needed / 1e9:.2f} GB - make room, or "
            "lower checkpoint.keep",
        )


def save_seconds(all_facts: Sequence[Facts], needed: int) -> float | None:
    """How long a checkpoint takes at the rate at which all wrote; None: it is not known."""
    rates = [p.written for f in all_facts for p in f.places if p.name == "checkpoint.dir"]
    # The slowest one ends last, and all write about as much.
    return needed / (min(rates) * len(rates)) if rates and min(rates) > 0 else None


def judge_clocks(all_facts: Sequence[Facts], limits: Limits) -> Iterator[Finding]:
    """Alike, against the median of the nodes."""
    known = [(facts, facts.clock) for facts in all_facts if facts.clock is not None]
    middle = median(clock for _, clock in known) if known else 0.0
    for facts, clock in known:
        if abs(clock - middle) > limits.skew:
            yield _on(
                "warning",
                "clocks",
                facts,
                f"its clock is {clock - middle:+.1f} s from the others'; expected: within "
                f"{limits.skew:.1f} s - see its time service",
            )


def judge_memory(all_facts: Sequence[Facts], copies: float) -> Iterator[Finding]:
    """Room for `copies` bytes of each process, and in /dev/shm."""
    for members in of_nodes(all_facts).values():
        free, wanted = members[0].host_memory, copies * len(members)
        if free < wanted:
            yield _on(
                "warning",
                "memory",
                members[0],
                f"{free / 1e9:.1f} GB of the host are available; expected: {wanted / 1e9:.1f} GB "
                "for copies of a checkpoint - end what else runs there, or lower "
                "checkpoint.host_gigabytes",
            )
        small = members[0].shared_memory
        if small < SMALL_SHARED_MEMORY * len(members):
            expected = SMALL_SHARED_MEMORY * len(members) >> 20
            yield _on(
                "warning",
                "memory",
                members[0],
                f"{small >> 20} MB are free in /dev/shm; expected: {expected} MB - give the "
                "container more, or clear what crashed jobs left",
            )
