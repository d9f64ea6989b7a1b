"""What a check has found, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from moebius.files import write_whole
from moebius.trainer.preflight.facts import Facts
from moebius.trainer.preflight.judge import of_nodes, save_seconds
from moebius.trainer.preflight.limits import Finding, Limits

FILE_NAME = "preflight.json"
BAD_NODES_NAME = "preflight-bad-nodes"
CHECKS = ("versions", "settings", "devices", "products", "links", "files", "clocks", "memory")


@dataclass(frozen=True)
class Report:
    """Of all processes; made on the main one."""

    facts: Sequence[Facts]
    findings: Sequence[Finding]
    limits: Limits
    checkpoint_bytes: int
    seconds: float

    @property
    def errors(self) -> list[Finding]:
        """What stops the job."""
        return [finding for finding in self.findings if finding.kind == "error"]

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes that errors are about."""
        return sorted({f.node for f in self.errors if f.node is not None})

    def tree(self) -> dict[str, Any]:
        """All numbers and verdicts, for JSON."""
        return {
            "verdict": "failed" if self.errors else "passed",
            "seconds": round(self.seconds, 2),
            "world_size": len(self.facts),
            "nodes": list(of_nodes(self.facts)),
            "bad_nodes": self.bad_nodes,
            "findings": [{**f._asdict(), "line": f.line} for f in self.findings],
            "limits": self.limits.model_dump(),
            "checkpoint": {
                "bytes": self.checkpoint_bytes,
                "seconds": save_seconds(self.facts, self.checkpoint_bytes),
            },
            "processes": [asdict(facts) for facts in self.facts],
        }

    def table(self) -> Table:
        """One line for each check."""
        table = Table(box=None, pad_edge=False)
        for column in ("check", "found", "verdict"):
            table.add_column(column)
        for check in CHECKS:
            kinds = {finding.kind for finding in self.findings if finding.check == check}
            verdict = "error" if "error" in kinds else "warning" if kinds else "ok"
            table.add_row(check, "\n".join(self._found(check)), verdict)
        return table

    def _found(self, check: str) -> Iterator[str]:
        facts, first = self.facts, self.facts[0]
        if check == "versions":
            yield ", ".join(f"{name} {value}" for name, value in first.versions.items())
        elif check == "settings":
            yield f"{len(facts)} processes on {len(of_nodes(facts))} nodes"
        elif check == "devices":
            size = first.device.memory / 1e9
            yield f"{first.device.kind}: {first.device.name}, {size:.1f} GB"
        elif check == "products":
            rates = [each.flops / 1e9 for each in facts]
            yield f"{min(rates):.1f} to {max(rates):.1f}, median {median(rates):.1f} GFLOP/s"
        elif check == "links":
            yield from self._links()
        elif check == "files":
            yield from self._files()
        elif check == "clocks":
            known = [each.clock for each in facts if each.clock is not None]
            yield f"within {max(known) - min(known):.3f} s" if known else "one node"
        else:
            free = min(each.host_memory for each in facts) / 1e9
            shared = min(each.shared_memory for each in facts) / 1e9
            yield f"{free:.1f} GB of the host, {shared:.2f} GB of /dev/shm free"

    def _links(self) -> Iterator[str]:
        names = [axis.name for axis in self.facts[0].axes]
        if not names:
            yield "one process"
        for name, where in (("near", "within a node"), ("far", "between nodes")):
            rates = [r for each in self.facts if (r := getattr(each, name)) is not None]
            if rates:
                yield f"messages {where}: {min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s"
        for name in names:
            axes = [axis for each in self.facts for axis in each.axes if axis.name == name]
            yield (
                f"{name} = {len(axes[0].ranks)}: all-reduce {_low(a.all_reduce for a in axes)}, "
                f"all-to-all {_low(a.all_to_all for a in axes)} GB/s, "
                f"{1e6 * max(a.latency for a in axes):.0f} us"
            )

    def _files(self) -> Iterator[str]:
        seconds = save_seconds(self.facts, self.checkpoint_bytes)
        if seconds is None:
            yield "not measured"
            return
        places = [p for each in self.facts for p in each.places if p.name == "checkpoint.dir"]
        written, read = sum(p.written for p in places) / 1e9, sum(p.read for p in places) / 1e9
        size = self.checkpoint_bytes / 1e9
        yield f"writes {written:.2f}, reads {read:.2f} GB/s: a checkpoint of {size:.3f} GB"
        yield f"takes {seconds:.1f} s"

    def write(self, folder: Path) -> str:
        """Into the run folder; what went wrong there, which must not hide what was found."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FILE_NAME, json.dumps(self.tree(), indent=1) + "\n")
            write_bad_nodes(folder, self.bad_nodes)
        except OSError as error:
            return f"'{folder / FILE_NAME}' is not written: {error.strerror or error}"
        return ""


def write_bad_nodes(folder: Path, nodes: Sequence[str]) -> None:
    """Names of nodes, one a line; the file of an earlier check goes. Raises OSError."""
    path = folder / BAD_NODES_NAME
    if nodes:
        write_whole(path, "".join(f"{name}\n" for name in nodes))
    else:
        path.unlink(missing_ok=True)


def write_silence(folder: Path, nodes: Sequence[str], line: str) -> None:
    """The report of a check that some processes did not live to see. Raises OSError."""
    finding = {"kind": "error", "check": "processes", "line": line}
    tree = {"verdict": "failed", "bad_nodes": list(nodes), "findings": [finding]}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE_NAME, json.dumps(tree, indent=1) + "\n")
    write_bad_nodes(folder, nodes)


def _low(rates: Iterator[float]) -> str:
    return f"{min(rates) / 1e9:.2f}"
