"""Heat maps of both routings: one cell for each expert of a layer, or pass of a loop."""

import torch
from torch import Tensor

from moebius.model.ledger import Ledger
from moebius.trainer.metrics import place_of

CELL = 24
"""side of a cell in pixels"""
NONE = (0.15, 0.15, 0.15)
"""colour of a cell that there is not: red, green, blue"""
COLD, EVEN, HOT = (0.13, 0.40, 0.67), (0.97, 0.97, 0.97), (0.70, 0.09, 0.17)
"""colours of 0, 1 and 2 or more"""


def pictures(ledger: Ledger) -> dict[str, Tensor]:
    """By name, uint8 images `[height, width, 3]` of a step's statistics.

    `width/load`: a row per router call site in order of execution, a column per expert; white is
    the mean load of the row, blue none, red twice the mean or more. `width/experts_per_token`: a
    column per number of experts from 0, where it varies, white an even share. `depth/selected`: a
    row per routed loop, a column per pass; white half of the candidates, red all.
    """
    sites = [sums for site, sums in ledger.statistics.items() if "k_histogram" in sums]
    loads = [_over_mean(sums["expert_tokens"]) for sums in sites]
    numbers = [_over_mean(sums["k_histogram"]) for sums in sites]
    loops: dict[str, list[Tensor]] = {}
    for site, sums in ledger.statistics.items():
        if "candidates" in sums:
            share = 2 * sums["selected"] / sums["candidates"].clamp(min=1)
            loops.setdefault(place_of(site).rpartition(".")[0], []).append(share)
    rows = {
        "width/load": loads,
        "width/experts_per_token": numbers if any((n > 0).sum() > 1 for n in numbers) else [],
        "depth/selected": [torch.stack(shares) for shares in loops.values()],
    }
    return {name: heat_map(values) for name, values in rows.items() if values}


def _over_mean(count_N: Tensor) -> Tensor:
    return count_N / count_N.mean().clamp(min=1e-9)


def heat_map(rows: list[Tensor]) -> Tensor:
    """Cells of numbers from 0 (blue) over 1 (white) to 2 (red); rows may differ in length."""
    width = max(len(row) for row in rows)
    grid = torch.full((len(rows), width), torch.nan)
    for number, row in enumerate(rows):
        grid[number, : len(row)] = row.float()
    none, cold, even, hot = (torch.tensor(colour) for colour in (NONE, COLD, EVEN, HOT))
    value = grid.clamp(0, 2).unsqueeze(-1)
    colour = torch.where(value < 1, cold.lerp(even, value), even.lerp(hot, value - 1))
    colour = torch.where(value.isnan(), none, colour)
    pixels = (255 * colour).round().to(torch.uint8)
    return pixels.repeat_interleave(CELL, dim=0).repeat_interleave(CELL, dim=1)
