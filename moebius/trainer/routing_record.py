"""Decisions over width on disk: one safetensors file per recorded step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.errors import DataError
from moebius.model.ledger import Ledger
from moebius.model.moe.replay import RoutingTable

SAMPLE_IDS = "sample_ids"


def save_routing(folder: Path, step: int, sample_ids: Sequence[int], ledger: Ledger) -> None:
    """Write the decisions of a step: by site the experts `[B, S, K]`, int16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        str(site): ids.to(torch.int16).cpu()
        for site, ids in ledger.routings.items()
        if not site.module.startswith("depth.")
    }
    tensors[SAMPLE_IDS] = torch.tensor(sample_ids)
    path = folder / f"step-{step:08}.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    temporary.replace(path)


def load_routing(folder: Path, device: torch.device) -> RoutingTable:
    """The decisions of all steps in a folder. Raises DataError where there are none."""
    paths = sorted(folder.glob("step-*.safetensors"))
    if not paths:
        raise DataError(
            f"selector replay: '{folder}' holds no recorded routing",
            "train a run with log.record_routing and name its routing folder",
        )
    steps = [_load_step(path, device) for path in paths]
    shapes = [{site: ids.shape[1:] for site, ids in step.items()} for step in steps]
    for path, shape in zip(paths, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"selector replay: '{path}' holds other sites or shapes than '{paths[0]}'",
                "record all steps with one config",
            )
    sample_ids = torch.cat([step.pop(SAMPLE_IDS) for step in steps])
    order = sample_ids.argsort()
    experts = {site: torch.cat([step[site] for step in steps])[order] for site in steps[0]}
    return RoutingTable(sample_ids[order], experts)


def _load_step(path: Path, device: torch.device) -> dict[str, Tensor]:
    """One file, checked. Raises DataError where it is none of a recorded step."""
    try:
        tensors = load_file(path, str(device))
    except (OSError, SafetensorError) as error:
        raise DataError(f"selector replay: cannot read '{path}': {error}") from None
    sample_ids = tensors.get(SAMPLE_IDS)
    if sample_ids is None or sample_ids.dim() != 1 or len(tensors) == 1:
        raise DataError(
            f"selector replay: '{path}' needs a list {SAMPLE_IDS} and a tensor per site"
        )
    for site, ids in tensors.items():
        if site != SAMPLE_IDS and (ids.dim() != 3 or len(ids) != len(sample_ids)):
            raise DataError(
                f"selector replay: '{path}': {site} is {list(ids.shape)}; expected "
                f"[{len(sample_ids)}, sequence length, experts per token]"
            )
    return tensors
