"""Weights of one model as the initial weights of another with other sharing of layers.

Both have the same unrolled layers. A dense model becomes a recursive one by choosing or averaging
the layers that are tied, and what is lost can go into adapters (Relaxed Recursive Transformers,
arXiv 2410.20672, section 2.3); a recursive one becomes dense by writing down each of its visits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from moebius.config import Problem
from moebius.model.config import DenseConfig, ModelConfig, NoFFN
from moebius.model.decoder import Decoder
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.router import Router
from moebius.model.program import Program, Visit
from moebius.model.recursion.config import DoraConfig
from moebius.model.visit import VisitLinear, VisitNorm

Method = Literal["stepwise", "average", "lower", "upper"]
"""where a shared layer's weights come from: from layers equally spaced over the depth, the first
and last included; from the mean of the layers it stands for; from the first; or from the last"""
Plain = Mapping[str, Tensor]
"""the tensors that a visit amounts to, by their names in a layer without anything per depth"""


def conversion_problems(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    """Why a model cannot become another; the paths are the target's."""
    for name in ("vocab_size", "hidden_size", "attention", "block", "norm_eps"):
        there, wanted = getattr(source, name), getattr(target, name)
        if there != wanted:
            yield Problem(name, f"{_short(wanted)}, but the source has {_short(there)}")
    if source.layer_norm_scaling != target.layer_norm_scaling:
        yield Problem("layer_norm_scaling", f"the source has {source.layer_norm_scaling}")
    if target.tie_embeddings and not source.tie_embeddings:
        yield Problem("tie_embeddings", "true, but the source has a head of its own: use false")
    if _computed(source.ffn) != _computed(target.ffn):
        yield Problem(
            "ffn",
            "computes other things than the source's; allowed are other losses and controllers of "
            "its router, and per_depth",
        )
    if source.depth.router is not None and (
        target.depth.router is None or target.depth.router.kind != source.depth.router.kind
    ):
        kind = source.depth.router.kind
        yield Problem("depth.router", f"the source's passes are gated by {kind}: use the same kind")
    elif source.depth.num_layers != target.depth.num_layers:
        yield Problem(
            "depth.num_layers",
            f"{target.depth.num_layers} unrolled layers, but the source has "
            f"{source.depth.num_layers}",
        )
    elif _sharing(source) != _sharing(target):
        yield from _tying_problems(source, target)


def _tying_problems(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    """What speaks against tying other layers."""
    if source.depth.router is not None:
        yield Problem(
            "depth.sharing",
            f"{target.depth.sharing}, but tokens leave the source's loop early: it is no sequence "
            f"of layers; use the source's {source.depth.sharing}",
        )
    if source.depth.kv != "per_depth":
        yield Problem(
            "depth.sharing",
            f"{target.depth.sharing}, but the source's passes share keys ({source.depth.kv}), "
            f"which unshared layers cannot; use the source's {source.depth.sharing}",
        )
    for name, router in (*source.routers.items(), *target.routers.items()):
        if getattr(router.scorer, "gating_residual", "none") == "prev_depth":
            yield Problem(
                f"{name}.router.scorer.gating_residual",
                "prev_depth names another router where layers are shared in another way",
            )
            break
    deep = getattr(target.attention, "depth_attention", None)
    if deep is not None and deep.scope == "recursions":
        yield Problem(
            "attention.depth_attention.scope",
            "recursions means other visits where layers are shared in another way",
        )
    if target.layer_norm_scaling == "unique":
        yield Problem("layer_norm_scaling", "unique changes with the sharing of layers")
    if getattr(target.ffn, "reuse", 1) > 1:
        yield Problem("ffn.reuse", "experts that layers reuse cannot be tied in another way")


def _computed(ffn: DenseConfig | MoEConfig | NoFFN) -> object:
    """A feed-forward's configuration without what only training reads."""
    if not isinstance(ffn, MoEConfig):
        return ffn
    router = ffn.router.model_copy(update={"losses": (), "controllers": (), "per_depth": False})
    return ffn.model_copy(update={"router": router})


def _sharing(model: ModelConfig) -> tuple[object, ...]:
    depth = model.depth
    return depth.sharing, depth.num_recursions, depth.groups


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) < 60 else "another one"


@torch.no_grad()
def convert(source: Decoder, target: Decoder, method: Method) -> list[str]:
    """Fill an initialised target from a trained source; returns what kept its initial values.

    Raises ValueError naming a tensor that the source lacks or has in another shape.
    """
    visits = source.program.visits
    plain = [visit_tensors(source.layers[visit.layer], visit) for visit in visits]
    for layer, places in sources(source.program, target.program, method).items():
        own = [v for v in target.program.visits if v.layer == layer]
        tied = [plain[visit.index] for visit in own]
        origin = visits[own[0].index].layer
        _fill(target.layers[layer], own, tied, _mean([plain[i] for i in places]))
        is_same = all(
            (visits[v.index].layer, visits[v.index].depth) == (origin, v.depth) for v in own
        )
        if is_same and source.config.depth.adapter == target.config.depth.adapter:
            _keep_adapters(source.layers[origin], target.layers[layer])
    kept = set(dict(target.named_parameters()))
    kept -= {name for name in kept if name.startswith("layers.")}
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        mine = _find(target, name)
        if not name.startswith("layers.") and mine is not None and mine.shape == tensor.shape:
            mine.copy_(tensor)
            kept.discard(name)
    if target.head is not None and source.head is None:
        target.head.weight.copy_(source.embedding.weight)
        kept.discard("head.weight")
    return sorted(kept)


def _keep_adapters(source: nn.Module, target: nn.Module) -> None:
    """Copy what the passes of a layer share and differ by, where both do so in the same way."""
    for name, module in target.named_modules():
        if isinstance(module, VisitLinear | VisitNorm):
            module.load_state_dict(source.get_submodule(name).state_dict())


def sources(source: Program, target: Program, method: Method) -> dict[str, list[int]]:
    """For each layer of the target the unrolled layers of the source whose mean it becomes.

    Stepwise rounds equal steps to the nearest layer, halves to the even one (as the authors' code).
    """
    places: dict[str, list[int]] = {}
    for visit in target.visits:
        places.setdefault(visit.layer, []).append(visit.index)
    shared = [layer for layer, indices in places.items() if len(indices) > 1]
    body = sorted(index for layer in shared for index in places[layer])
    for number, layer in enumerate(shared):
        origins = {source.visits[index].layer for index in places[layer]}
        if len(origins) == 1 or method == "average":
            continue
        chosen = {
            "lower": number,
            "upper": len(body) - len(shared) + number,
            "stepwise": round(number * (len(body) - 1) / max(len(shared) - 1, 1)),
        }[method]
        places[layer] = [body[chosen]]
    return places


def visit_tensors(layer: nn.Module, visit: Visit) -> dict[str, Tensor]:
    """What a visit to a layer amounts to: its weights and its rows of the routers' state."""
    tensors: dict[str, Tensor] = {}
    for name, module in layer.named_modules():
        if isinstance(module, VisitLinear | VisitNorm):
            tensors[f"{name}.weight"] = module.plain(visit)
        elif isinstance(module, Router):
            tensors |= _router_tensors(name, module, visit)
        elif not _inside_router(layer, name):
            own = module.named_parameters(recurse=False)
            tensors |= {f"{name}.{key}" if name else key: value for key, value in own}
    return tensors


def _router_tensors(name: str, router: Router, visit: Visit) -> dict[str, Tensor]:
    """Of the sites that a router serves at a visit, by turn: parameters, and rows of buffers."""
    sublayer = name.partition(".routers.")[0]
    tensors: dict[str, Tensor] = {}
    for use, site in enumerate(router.sites):
        if site.depth != visit.depth:
            continue
        path = f"{sublayer}.turn{site.iteration}"
        tensors |= {f"{path}.{key}": value for key, value in router.named_parameters()}
        tensors |= {f"{path}.{key}": value[use] for key, value in _state(router).items()}
    return tensors


def _state(router: Router) -> dict[str, Tensor]:
    """Persistent buffers, one row for each use."""
    parameters = dict(router.named_parameters())
    return {key: value for key, value in router.state_dict().items() if key not in parameters}


def _inside_router(layer: nn.Module, name: str) -> bool:
    parts = name.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(isinstance(layer.get_submodule(parent), Router) for parent in parents)


def _fill(layer: nn.Module, visits: Sequence[Visit], tied: Sequence[Plain], base: Plain) -> None:
    """A layer from the tensors of its visits and from those that they share."""
    for name, module in layer.named_modules():
        if isinstance(module, VisitLinear):
            weights = [_get(plain, f"{name}.weight", module.weight) for plain in tied]
            _fill_linear(module, _get(base, f"{name}.weight", module.weight), weights)
        elif isinstance(module, VisitNorm):
            module.weight.copy_(_get(base, f"{name}.weight", module.weight))
            if module.has_gain:
                module.weight[module.weight == 0] = 1.0  # no gain could make anything else of 0
                gains = [_get(plain, f"{name}.weight", module.weight) for plain in tied]
                module.gain.copy_(torch.stack(gains) / module.weight)
        elif isinstance(module, Router):
            _fill_router(name, module, tied, base)
        elif not _inside_router(layer, name):
            for key, value in module.named_parameters(recurse=False):
                value.copy_(_get(base, f"{name}.{key}" if name else key, value))


def _fill_linear(module: VisitLinear, base: Tensor, weights: Sequence[Tensor]) -> None:
    """The shared weight, and for each depth the best adapter of its rank by SVD."""
    module.weight.copy_(base)
    if module.adapter is None:
        return
    for number, weight in enumerate(weights):
        residual = weight.double() - module.weight.double()
        if residual.any():
            rank = min(module.adapter.rank, *residual.shape)
            u, s, vt = torch.linalg.svd(residual, full_matrices=False)
            module.down[number].zero_()
            module.up[number].zero_()
            module.down[number, :rank] = vt[:rank].to(weight.dtype)
            up = u[:, :rank] * s[:rank] / module.adapter.scale
            module.up[number, :, :rank] = up.to(weight.dtype)
        if isinstance(module.adapter, DoraConfig):
            module.magnitude[number] = weight.norm(dim=1)


def _fill_router(name: str, router: Router, tied: Sequence[Plain], base: Plain) -> None:
    """Parameters from what the visits share, or for a router of one depth from its visit."""
    sublayer = name.partition(".routers.")[0]
    depths = {site.depth for site in router.sites}
    state = _state(router)
    for use, site in enumerate(router.sites):
        path, visit = f"{sublayer}.turn{site.iteration}", tied[site.depth - 1]
        for key, value in state.items():
            row = visit.get(f"{path}.{key}")
            if row is not None and row.shape == value[use].shape:
                value[use] = row
        plain = visit if len(depths) == 1 else base
        for key, parameter in router.named_parameters():
            found = plain.get(f"{path}.{key}")
            if found is None and key == "scorer.residual":
                continue  # the source's layer has no router before it
            parameter.copy_(_get(plain, f"{path}.{key}", parameter))


def _mean(tensors: Sequence[Plain]) -> dict[str, Tensor]:
    """The mean of each tensor over those that have it; exact where they are equal."""
    means = {}
    for name in dict.fromkeys(name for plain in tensors for name in plain):
        found = [plain[name] for plain in tensors if name in plain]
        means[name] = torch.stack([t.double() for t in found]).mean(dim=0).to(found[0].dtype)
    return means


def _get(plain: Plain, name: str, like: Tensor) -> Tensor:
    found = plain.get(name)
    if found is None:
        raise ValueError(f"the source has no {name}")
    if found.shape != like.shape:
        raise ValueError(f"{name} is {list(found.shape)} in the source, not {list(like.shape)}")
    return found


def _find(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by its full name."""
    parent, _, key = name.rpartition(".")
    try:
        return cast(Tensor | None, getattr(module.get_submodule(parent), key, None))
    except AttributeError:
        return None
