"""One cluster for all tests of this directory, with everything in a user's home."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster import Cluster

from .login import Login


@pytest.fixture(scope="package")
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Login]:
    cluster = Cluster(tmp_path_factory.mktemp("unprivileged") / "state")
    try:
        # Heterogeneous jobs are started only by the backfill scheduler.
        often = "SchedulerParameters=batch_sched_delay=0,bf_interval=1"
        cluster.up(cpus=64, memory=64000, extra_conf=often)
        login = Login(cluster)
        login.install()
        yield login
    finally:
        cluster.down()


@pytest.fixture
def cold(login: Login) -> Login:
    """The same, with nothing staged on any node."""
    login.forget()
    return login
