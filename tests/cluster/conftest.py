"""One cluster for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.machines import INSTALLED, Cluster

REQUIRED = os.environ.get("MOEBIUS_REQUIRE_SLURM") == "1"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes. Skipped where SLURM is not installed, unless the environment says that it is."""
    if not INSTALLED:
        assert not REQUIRED, "SLURM is not installed (slurmctld, slurmd, slurm-client)"
        pytest.skip("SLURM is not installed (slurmctld, slurmd, slurm-client)")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    found = Cluster(tmp_path_factory.mktemp("slurm"), 3, int(worker))
    try:
        found.start()
        yield found
    finally:
        found.stop()
