"""Decisions over width on disk: one safetensors file per recorded step."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.errors import DataError
from moebius.model.ledger import Ledger
from moebius.model.moe.replay import RoutingTable

SAMPLE_IDS = "sample_ids"


def save_routing(folder: Path, step: int, sample_ids_B: Tensor, ledger: Ledger) -> None:
    """Write the decisions of a step: by site the experts `[B, S, K]`, int16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {str(site): ids.to(torch.int16).cpu() for site, ids in ledger.routings.items()}
    tensors[SAMPLE_IDS] = sample_ids_B.cpu()
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
    try:
        steps = [load_file(path, str(device)) for path in paths]
    except (OSError, SafetensorError) as error:
        raise DataError(f"selector replay: cannot read a file of '{folder}': {error}") from None
    sample_ids = torch.cat([step.pop(SAMPLE_IDS) for step in steps])
    order = sample_ids.argsort()
    experts = {site: torch.cat([step[site] for step in steps])[order] for site in steps[0]}
    return RoutingTable(sample_ids[order], experts)
