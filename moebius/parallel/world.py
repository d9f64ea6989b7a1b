"""The processes a launcher started."""

import os

from moebius.errors import LayoutError


def check_world_size() -> None:
    """Raise LayoutError under a launcher that started several processes."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size != 1:
        raise LayoutError(
            f"world size {world_size}: this version trains in one process",
            "launch with --nproc-per-node 1 on one node",
        )
