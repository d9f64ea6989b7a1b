"""The unrolled list of visits: which unique layer runs at which depth (DepthConfig -> Program)."""

from collections.abc import Mapping
from dataclasses import dataclass

from moebius.model.recursion.config import DepthConfig, DepthRouterConfig


@dataclass(frozen=True, order=True)
class Site:
    """A router call site: statistics and losses belong to it, not to the parameter.

    `module` names the layer and its sublayer (`layers.1.ffn`), `depth` the pass of a recursion,
    `iteration` the turn of a chain of experts; both count from 1.
    """

    module: str
    depth: int
    iteration: int = 1

    def __str__(self) -> str:
        return f"{self.module}@{self.depth}" + f".{self.iteration}" * (self.iteration > 1)


@dataclass(frozen=True)
class Visit:
    """One use of a layer.

    `layer` names the unique layer, `depth` counts the passes of the loop it is in (from 1), `index`
    is its place in the unrolled program (from 0).
    """

    layer: str
    depth: int
    index: int

    def site(self, sublayer: str, iteration: int = 1) -> Site:
        """The call site of a sublayer's router at this visit."""
        return router_site(self.layer, sublayer, self.depth, iteration)


def router_site(layer: str, sublayer: str, depth: int, iteration: int) -> Site:
    """The call site of a sublayer's router."""
    return Site(f"layers.{layer}.{sublayer}", depth, iteration)


@dataclass(frozen=True)
class LayerPlace:
    """Where a unique layer stands in a program."""

    name: str
    index: int
    """number among the unique layers, from 0"""
    num_layers: int
    """unique layers"""
    num_depths: int
    """how often it is visited"""
    predecessors: Mapping[str, int]
    """by sublayer, how many experts the router before it scores; missing where there is none"""

    def site(self, sublayer: str, depth: int, iteration: int = 1) -> Site:
        """The call site of a sublayer's router."""
        return router_site(self.name, sublayer, depth, iteration)


@dataclass(frozen=True)
class Segment:
    """Consecutive visits that repeat a group of layers; with a router, tokens may leave in between.

    `capacities[r - 1]` is the share of the sequence that enters depth r, 1.0 without a router.
    """

    passes: tuple[tuple[Visit, ...], ...]
    capacities: tuple[float, ...]
    router: DepthRouterConfig | None = None


@dataclass(frozen=True)
class Program:
    """What the executor runs. A dense transformer is a program of one segment with one pass."""

    segments: tuple[Segment, ...]

    @property
    def visits(self) -> tuple[Visit, ...]:
        """All visits in order of execution."""
        return tuple(v for segment in self.segments for visits in segment.passes for v in visits)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the unique layers, in order of first use."""
        return tuple(dict.fromkeys(visit.layer for visit in self.visits))

    def num_depths(self, layer: str) -> int:
        """How often a layer is visited."""
        return max(visit.depth for visit in self.visits if visit.layer == layer)


def build_program(depth: DepthConfig) -> Program:
    """Unroll a valid depth configuration (see `sharing_rules`).

    Unique layer of unrolled index l, with L layers and N_r recursions (Mixture-of-Recursions,
    arXiv 2507.10524, section 2.2): cycle `l mod (L / N_r)`; sequence `l // N_r`; the middle
    variants do the same between a first and a last layer of their own.
    """
    layers, repeats = depth.num_layers, depth.num_recursions
    middle = depth.sharing.startswith("middle")
    looped = (layers - 2 * middle) // repeats
    names = [str(number) for number in range(looped + 2 * middle)]
    body = names[1:-1] if middle else names

    groups: list[tuple[list[str], int]] = []
    if middle:
        groups.append(([names[0]], 1))
    if depth.sharing.endswith("sequence"):
        groups.extend(([name], repeats) for name in body)
    else:
        groups.append((body, repeats))
    if middle:
        groups.append(([names[-1]], 1))

    segments = []
    index = 0
    for group, times in groups:
        passes = []
        for number in range(times):
            passes.append(tuple(Visit(name, number + 1, index + i) for i, name in enumerate(group)))
            index += len(group)
        routed = depth.router is not None and group is body
        router = depth.router if routed else None
        segments.append(Segment(tuple(passes), _capacities(router, times), router))
    return Program(tuple(segments))


def _capacities(router: DepthRouterConfig | None, repeats: int) -> tuple[float, ...]:
    if router is None:
        return (1.0,) * repeats
    if router.capacities is not None:
        return router.capacities
    return tuple((repeats - number) / repeats for number in range(repeats))


def kept_tokens(capacity: float, sequence_length: int) -> int:
    """k_r: how many tokens of a full row enter a depth, at least one."""
    return max(1, int(capacity * sequence_length + 1e-9))
