"""One layer at one visit, token by token and head by head, in plain Python loops.

Tensors are vectors of one token; parameters are the decoder's own, so gradients can be compared.
"""

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor

from moebius.model.config import BDHConfig, DenseConfig, MixtureAttentionConfig
from moebius.model.decoder import Decoder
from moebius.model.moe.config import MoEConfig
from moebius.model.program import Visit

Heads = list[Tensor]
Stream = dict[int, Tensor]
"""by place in the row, the vectors of the tokens that are present"""


@dataclass
class Row:
    """One row, and what its tokens leave behind on their way."""

    segments: list[int]
    cos: list[Tensor]
    sin: list[Tensor]
    keys: dict[tuple[str, int, int], tuple[Heads, Heads]] = field(default_factory=dict)
    """by layer, token and depth: keys and (mixed) values by head"""
    past: dict[int, list[tuple[Visit, Heads, Heads]]] = field(default_factory=dict)
    """by token: keys and values of all visits that it made, for depth attention"""
    scores: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """by name and token: scores of an earlier router"""

    def earlier(self, t: int) -> list[int]:
        """Places of t's document up to t."""
        return [s for s in range(t + 1) if self.segments[s] == self.segments[t]]


class NaiveLayers:
    """All unique layers of a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config
        self.program = decoder.program
        self.w = dict(decoder.named_parameters())
        self.squares: dict[tuple[str, int], list[Tensor]] = {}
        """by layer and depth: of each token logsumexp^2 of the scores over width"""

    def run(self, visit: Visit, x: Stream, row: Row) -> Stream:
        """The stream of the present tokens after a visit."""
        if isinstance(self.config.attention, BDHConfig):
            return self.bdh(visit, x, row)
        prefix = f"layers.{visit.layer}"
        normed = {t: self.norm(f"{prefix}.attention_norm", v, visit) for t, v in x.items()}
        attended = self.attention(visit, normed, row)
        x = {t: v + attended[t] for t, v in x.items()}
        normed = {t: self.norm(f"{prefix}.ffn_norm", v, visit) for t, v in x.items()}
        return {t: v + self.ffn(visit, normed[t], row, t) for t, v in x.items()}

    def norm(self, name: str, x: Tensor, visit: Visit | None) -> Tensor:
        """RMSNorm, the depth's gain, and the root of the layer's number."""
        y = x / ((x * x).mean() + self.config.norm_eps).sqrt() * self.w[f"{name}.weight"]
        if visit is None:
            return y
        if f"{name}.gain" in self.w:
            y = y * self.w[f"{name}.gain"][visit.depth - 1]
        if self.config.layer_norm_scaling == "unrolled":
            y = y / sqrt(1 + visit.index)
        elif self.config.layer_norm_scaling == "unique":
            y = y / sqrt(1 + self.program.layers.index(visit.layer))
        return y

    def linear(self, name: str, x: Tensor, visit: Visit) -> Tensor:
        """The visit's own matrix times a vector."""
        weight, adapter = self.w[f"{name}.weight"], self.config.depth.adapter
        if f"{name}.down" not in self.w:
            return weight @ x
        r = visit.depth - 1
        assert adapter is not None
        weight = weight + adapter.scale * (self.w[f"{name}.up"][r] @ self.w[f"{name}.down"][r])
        if adapter.kind == "dora":
            sizes = self.w[f"{name}.magnitude"][r]
            rows = [m * v / (v * v).sum().sqrt() for m, v in zip(sizes, weight, strict=True)]
            weight = torch.stack(rows)
        return weight @ x

    def heads(self, vector: Tensor) -> Heads:
        """A projection as a list of heads."""
        return list(vector.view(-1, self.config.attention.head_dim))

    def turned(self, head: Tensor, row: Row, t: int) -> Tensor:
        """A head rotated by its token's position: channel i with channel i + C / 2."""
        if self.config.attention.kind != "bdh" and self.config.attention.positions == "none":
            return head
        half = len(head) // 2
        cos, sin = row.cos[t][:half], row.sin[t][:half]
        a, b = head[:half], head[half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    def attention(self, visit: Visit, x: Stream, row: Row) -> Stream:
        """Keys of all present tokens first, then each token's own sum over what it may see."""
        prefix = f"layers.{visit.layer}.attention"
        is_mixture = isinstance(self.config.attention, MixtureAttentionConfig)
        for t, vector in x.items():
            if self.config.depth.kv == "shared_first" and visit.depth > 1:
                break
            k = self.heads(self.linear(f"{prefix}.k", vector, visit))
            k = [self.turned(head, row, t) for head in k]
            v = self.heads(self.linear(f"{prefix}.v", vector, visit))
            if not is_mixture and self.config.attention.depth_attention is not None:
                q = self.heads(self.linear(f"{prefix}.q", vector, visit))
                q = [self.turned(head, row, t) for head in q]
                v = self.mix_over_depth(visit, q, k, v, row.past.setdefault(t, []))
                row.past[t].append((visit, k, v))
            row.keys[visit.layer, t, visit.depth] = (k, v)
        out = {}
        for t, vector in x.items():
            if is_mixture:
                out[t] = self.attention_experts(visit, vector, row, t)
                continue
            q = self.heads(self.linear(f"{prefix}.q", vector, visit))
            mixed = torch.cat(self.look(visit, q, row, t))
            out[t] = self.linear(f"{prefix}.out", mixed, visit)
        return out

    def attention_experts(self, visit: Visit, x: Tensor, row: Row, t: int) -> Tensor:
        """The two best experts' queries and outputs, all with the same keys."""
        prefix = f"layers.{visit.layer}.attention"
        logits = self.w[f"{prefix}.routers.0.scorer.weight"] @ x
        probs = (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()
        best = sorted(range(len(probs)), key=lambda e: -float(probs[e].detach()))[:2]
        total = torch.zeros_like(x)
        for e in best:
            q = self.heads(self.w[f"{prefix}.q"][e] @ x)
            mixed = torch.cat(self.look(visit, q, row, t))
            total = total + probs[e] * (self.w[f"{prefix}.out"][e] @ mixed)
        return total

    def visible(self, visit: Visit, row: Row, t: int) -> list[tuple[Heads, Heads]]:
        """The keys and values that a token may look at, the earliest token first."""
        found = []
        for s in row.earlier(t):
            mine = {
                d: kv for (layer, u, d), kv in row.keys.items() if (layer, u) == (visit.layer, s)
            }
            looped = sum(other.layer == visit.layer for other in self.program.visits) > 1
            if self.config.depth.kv == "per_depth" or not looped:
                wanted = [visit.depth]
            elif self.config.depth.kv == "shared_first":
                wanted = [1]
            else:
                wanted = list(range(visit.depth, 0, -1))
            seen = [mine[d] for d in wanted if d in mine]
            found += seen[:1]
        return found

    def look(self, visit: Visit, q: Heads, row: Row, t: int) -> Heads:
        """The weighted sum over the sequence of each head."""
        seen = self.visible(visit, row, t)
        out = []
        for h, raw in enumerate(q):
            head = self.turned(raw, row, t)
            group = h // (len(q) // len(seen[0][0]))
            logits = [(head * k[group]).sum() / sqrt(len(head)) for k, _ in seen]
            values = [v[group] for _, v in seen]
            out.append(
                weighted(softmax(logits), values)
                if self.config.attention.core == "softmax"
                else weighted(stick_breaking(logits), values)
            )
        return out

    def mix_over_depth(
        self, visit: Visit, q: Heads, k: Heads, v: Heads, past: list[tuple[Visit, Heads, Heads]]
    ) -> Heads:
        """Each value head with those of the token's earlier visits."""
        deep = self.config.attention.depth_attention
        steps = []
        for other, old_k, old_v in past:
            reach = {
                "all": True,
                "window": visit.index - other.index < deep.window,
                "recursions": other.layer == visit.layer,
            }
            if reach[deep.scope]:
                steps.append((old_k, old_v))
        steps.append((k, v))
        size = len(q) // len(k)
        mixed = []
        for g in range(len(k)):
            total = torch.zeros_like(v[g])
            for head in q[g * size : (g + 1) * size]:
                logits = [(head * keys[g]).sum() / sqrt(len(head)) for keys, _ in steps]
                total = total + weighted(softmax(logits), [values[g] for _, values in steps])
            mixed.append(total / size)
        return mixed

    def ffn(self, visit: Visit, x: Tensor, row: Row, t: int) -> Tensor:
        """A dense SwiGLU, or the two best of several."""
        prefix = f"layers.{visit.layer}.ffn"
        if isinstance(self.config.ffn, MoEConfig):
            return self.experts(visit, x, row, t)
        assert isinstance(self.config.ffn, DenseConfig)
        gate = self.linear(f"{prefix}.gate", x, visit)
        inner = gate * gate.sigmoid() * self.linear(f"{prefix}.up", x, visit)
        return self.linear(f"{prefix}.down", inner, visit)

    def experts(self, visit: Visit, x: Tensor, row: Row, t: int) -> Tensor:
        """A pool of SwiGLU experts only; the scores of an earlier router are added."""
        prefix, router = f"layers.{visit.layer}.ffn", self.config.ffn.router
        number = visit.depth - 1 if router.per_depth else 0
        name = f"{prefix}.routers.{number}.scorer"
        logits = self.w[f"{name}.weight"] @ x
        residual = router.scorer.gating_residual
        before = ("ffn" if residual == "prev_layer" else visit.layer, t)
        if residual != "none" and before in row.scores:
            logits = logits + self.w[f"{name}.residual"] @ row.scores[before]
        row.scores[before] = logits
        square = sum(z.exp() for z in logits).log() ** 2
        self.squares.setdefault((visit.layer, visit.depth), []).append(square)
        probs = torch.stack(softmax(list(logits)))
        total = torch.zeros_like(x)
        for e in sorted(range(len(probs)), key=lambda e: -float(probs[e].detach()))[:2]:
            gate, up = (self.w[f"{prefix}.experts.groups.0.gate_up"][e] @ x).chunk(2)
            inner = gate * gate.sigmoid() * up
            total = total + probs[e] * (self.w[f"{prefix}.experts.groups.0.down"][e] @ inner)
        return total

    def bdh(self, visit: Visit, x: Stream, row: Row) -> Stream:
        """Positive neurons that hear earlier present tokens, not themselves."""
        prefix = f"layers.{visit.layer}"
        encoder, second = self.w[f"{prefix}.encoder"], self.w[f"{prefix}.encoder_v"]
        neurons = {t: [(v @ head).relu() for head in encoder] for t, v in x.items()}
        out = {}
        for t, vector in x.items():
            products = []
            for h, u in enumerate(neurons[t]):
                heard = torch.zeros_like(vector)
                for s in row.earlier(t)[:-1]:
                    if s in x:
                        key = self.turned(neurons[s][h], row, s)
                        heard = heard + (self.turned(u, row, t) * key).sum() * x[s]
                products.append(u * (self.plain_norm(heard) @ second[h]).relu())
            update = torch.cat(products) @ self.w[f"{prefix}.decoder"]
            out[t] = self.plain_norm(vector + self.plain_norm(update))
        return out

    def plain_norm(self, x: Tensor) -> Tensor:
        """LayerNorm without parameters."""
        centred = x - x.mean()
        return centred / ((centred * centred).mean() + self.config.norm_eps).sqrt()


def softmax(logits: list[Tensor]) -> list[Tensor]:
    """Weights that add up to 1."""
    highest = max(float(logit.detach()) for logit in logits)
    powers = [(logit - highest).exp() for logit in logits]
    return [power / sum(powers) for power in powers]


def stick_breaking(logits: list[Tensor]) -> list[Tensor]:
    """From the last on backwards, each takes its share of what is left."""
    left, weights = torch.ones((), dtype=torch.float64), []
    for logit in reversed(logits):
        weights.append(left * logit.sigmoid())
        left = left * (1 - logit.sigmoid())
    return weights[::-1]


def weighted(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    """The weighted sum."""
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total = total + weight * value
    return total
