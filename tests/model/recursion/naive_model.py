"""A whole model with routed loops, token by token: selection, gates, losses of the depth routers.

Written from the paper's equations with Python lists of survivors; shares nothing with the executor
but the parameters, the tables of the rotation and the unrolled list of visits.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from math import cos, pi

import torch
from torch import Tensor

from moebius.model.context import Mode
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.program import Segment
from moebius.model.recursion.config import CausalRouter, ExpertChoiceConfig, TokenChoiceConfig
from moebius.model.schedule import value_at
from tests.model.recursion.naive_layer import NaiveLayers, Row, Stream, softmax


@dataclass
class Terms:
    """What the losses of the depth routers are made of, over all rows."""

    sums: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    """sum over candidates by loss, loop and depth"""
    counts: dict[tuple[str, str, int], int] = field(default_factory=lambda: defaultdict(int))
    """candidates"""
    selected: dict[tuple[str, int], list[list[int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """tokens of each row that made a pass, by loop and depth"""
    probs: dict[str, list[list[Tensor]]] = field(default_factory=lambda: defaultdict(list))
    """of token choice, by loop and row: probabilities of each token"""
    chosen: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    """and its depth, from 1"""
    judged: dict[tuple[str, int], list[bool]] = field(default_factory=lambda: defaultdict(list))
    """of each candidate, whether its threshold decides as the selection did"""
    gates: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    """sums over selected tokens"""

    def add(self, key: tuple[str, str, int], value: Tensor) -> None:
        """Count another candidate."""
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] += 1


class NaiveModel:
    """The same model as an executor's."""

    def __init__(self, executor: LocalExecutor, mode: Mode = "topk", step: int = 0) -> None:
        self.decoder, self.program = executor.decoder, executor.program
        self.config = self.decoder.config
        self.layers = NaiveLayers(self.decoder)
        self.w = self.layers.w
        self.mode, self.step = mode, step
        self.terms = Terms()

    def hidden(self, batch: TokenBatch) -> dict[int, list[list[Tensor]]]:
        """Normalised hidden states by number of visits made, row and token."""
        cos_BSC, sin_BSC = self.decoder.rope(batch.positions_BS)
        exits: dict[int, list[list[Tensor]]] = {}
        for b, tokens in enumerate(batch.tokens_BS.tolist()):
            segments = batch.segment_ids_BS[b].tolist()
            row = Row(segments, list(cos_BSC[b].double()), list(sin_BSC[b].double()))
            x = {t: self.w["embedding.weight"][token] for t, token in enumerate(tokens)}
            if self.config.attention.kind == "bdh":
                x = {t: self.layers.plain_norm(v) for t, v in x.items()}
            for number, stream in self.row_streams(x, row).items():
                normed = [self.layers.norm("norm", stream[t], None) for t in range(len(tokens))]
                exits.setdefault(number, []).append(normed)
        return exits

    def row_streams(self, x: Stream, row: Row) -> dict[int, Stream]:
        """The stream of all tokens of a row wherever a head can read it."""
        found = {}
        for segment in self.program.segments:
            if isinstance(segment.router, ExpertChoiceConfig):
                x = self.expert_loop(x, row, segment, segment.router, found)
            elif isinstance(segment.router, TokenChoiceConfig):
                x = self.token_loop(x, row, segment, segment.router, found)
            else:
                for visit in (visit for visits in segment.passes for visit in visits):
                    x = self.layers.run(visit, x, row)
                    found[visit.index + 1] = x
        return found

    def score(self, prefix: str, scorer: object, x: Tensor) -> Tensor:
        """Scores of one token."""
        weight = self.w[f"{prefix}.weight"]
        if scorer.kind == "mlp":
            inner = self.w[f"{prefix}.up"] @ x
            return weight @ (inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
        if scorer.kind == "cosine":
            token = self.w[f"{prefix}.projection"] @ x
            scale = self.w[f"{prefix}.log_scale"].exp()
            cosines = [(token @ v) / (token.norm() * v.norm()) for v in weight]
            return torch.cat([scale * cosine.view(1) for cosine in cosines])
        return weight @ x

    def share(self, router: ExpertChoiceConfig, number: int, passes: int) -> float:
        """c_r at the optimizer step."""
        share = (passes - number) / passes
        if router.capacities is not None:
            share = value_at(router.capacities[number], self.step)
        if router.warmup_steps:
            n = min(1.0, self.step / router.warmup_steps)
            share = share + (1 - share) * (1 + cos(pi * n)) / 2
        return share

    def best(
        self, logits: dict[int, float], row: Row, share: float, router: ExpertChoiceConfig
    ) -> list[int]:
        """The survivors with the highest logits, of the row or of each document."""
        length = len(row.segments)

        def top(candidates: list[int], size: int, multiple: int) -> list[int]:
            k = max(1, int(share * size + 1e-9))
            while k % multiple:
                k += 1
            return sorted(candidates, key=lambda t: (-logits[t], t))[:k]

        if router.scope == "row":
            return sorted(top(list(logits), length, router.multiple_of))
        kept = []
        for document in sorted(set(row.segments)):
            mine = [t for t in logits if row.segments[t] == document]
            kept += top(mine, row.segments.count(document), 1)
        return sorted(kept)

    def expert_loop(
        self,
        x: Stream,
        row: Row,
        segment: Segment,
        router: ExpertChoiceConfig,
        found: dict[int, Stream],
    ) -> Stream:
        """h <- h + g F(h) for those who are selected among those who were selected before."""
        loop, prefix = segment.site(1).module, f"depth_routers.{segment.number}"
        survivors = list(x)
        for number, visits in enumerate(segment.passes):
            logits, judged = {}, {}
            for t in survivors:
                scaled = x[t] / router.temperature
                logits[t] = self.score(f"{prefix}.scorers.{number}", router.scorer, scaled)[0]
                judged[t] = logits[t]
                if isinstance(router.causal, CausalRouter):
                    name, scorer = f"{prefix}.predictors.{number}", router.causal.scorer
                    judged[t] = self.score(name, scorer, scaled.detach())[0]
            kept = [t for t in survivors if judged[t] >= 0]
            if self.mode == "topk":
                share = self.share(router, number, self.config.depth.num_recursions)
                kept = self.best(
                    {t: float(z.detach()) for t, z in logits.items()}, row, share, router
                )
                for t in survivors:
                    agrees = bool(judged[t] >= 0) == (t in kept)
                    self.terms.judged[loop, number + 1].append(agrees)
                    p = judged[t].sigmoid()
                    error = -p.log() if t in kept else -(1 - p).log()
                    self.terms.add(("causal", loop, number + 1), error)
                    self.terms.add(("z", loop, number + 1), logits[t] ** 2)
            survivors = kept
            self.terms.selected[loop, number + 1].append(kept)
            inner = {t: x[t] for t in survivors}
            outer = inner
            for visit in visits:
                outer = self.layers.run(visit, outer, row)
            x = dict(x)
            for t in survivors:
                gate = self.gate(router, logits[t])
                update = outer[t] - inner[t] if router.gating == "additive" else outer[t]
                x[t] = x[t] + gate * update
                self.terms.gates[loop, number + 1] += float(gate.detach())
            found[visits[-1].index + 1] = x
        return x

    def gate(self, router: ExpertChoiceConfig, logit: Tensor) -> Tensor:
        """alpha times the activation."""
        shapes = {
            "sigmoid": 1 / (1 + (-logit).exp()),
            "tanh": (logit.exp() - (-logit).exp()) / (logit.exp() + (-logit).exp()),
            "none": logit,
            "constant": torch.ones_like(logit),
        }
        return router.alpha * shapes[router.activation]

    def token_loop(
        self,
        x: Stream,
        row: Row,
        segment: Segment,
        router: TokenChoiceConfig,
        found: dict[int, Stream],
    ) -> Stream:
        """h <- h + g F^i(h), or h + (g F)^i(h)."""
        loop, prefix = segment.site(1).module, f"depth_routers.{segment.number}.router"
        depths: dict[int, int] = {}
        gates: dict[int, Tensor] = {}
        probs = []
        for t, vector in x.items():
            logits = list(self.score(f"{prefix}.scorer", router.scorer, vector))
            self.terms.add(("z", loop, 1), sum(z.exp() for z in logits).log() ** 2)
            if router.norm.kind == "softmax":
                affinity = softmax(logits)
            else:
                affinity = [1 / (1 + (-z).exp()) for z in logits]
            probs.append(torch.stack([a / sum(affinity) for a in affinity]))
            steered = [float(a.detach()) for a in affinity]
            for name, bias in self.decoder.named_buffers():
                if name.startswith(f"{prefix}.controllers") and name.endswith("bias_UN"):
                    steered = [a + float(b) for a, b in zip(steered, bias[0], strict=True)]
            depths[t] = 1 + steered.index(max(steered))
            self.terms.chosen[loop] += [[]] if t == 0 else []
            self.terms.chosen[loop][-1].append(depths[t])
            if self.step < router.full_depth_steps:
                depths[t] = len(affinity)
            gates[t] = router.alpha * affinity[depths[t] - 1]
            depths[t] = min(depths[t], len(segment.passes))
        self.terms.probs[loop].append(probs)
        inner, left = dict(x), dict(x)
        for number, visits in enumerate(segment.passes):
            present = {t: inner[t] for t in x if depths[t] >= number + 1}
            self.terms.selected[loop, number + 1].append(list(present))
            for visit in visits:
                present = self.layers.run(visit, present, row)
            for t, vector in present.items():
                gated = gates[t] * vector
                inner[t] = gated if router.gating == "every" else vector
                if depths[t] == number + 1:
                    left[t] = x[t] + gated
            found[visits[-1].index + 1] = dict(left)
        return left
