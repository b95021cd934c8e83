"""One cluster for all tests of this directory; it takes some seconds to come up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.client import Cluster

from .site import HOOKS, Site

SETTINGS = {
    "prolog": f"{HOOKS}/prolog",
    "epilog": f"{HOOKS}/epilog",
    "task_prolog": f"{HOOKS}/task_prolog",
    "prolog_flags": "Alloc",
    "private_tmp": "",
    "jc_extra": "",
    "cpus": 8,
    # Heterogeneous jobs are started by the backfill scheduler alone, every 30 s if nothing is said.
    "extra_conf": "SchedulerParameters=batch_sched_delay=0,bf_interval=1",
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The cluster with stager installed; alice and bob have an environment each."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "state")
    try:
        cluster.up(**SETTINGS)
        site = Site(cluster)
        site.install()
        yield site
    finally:
        cluster.down()
