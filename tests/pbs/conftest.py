"""The hosts of the project's cluster, with what nodes of PBS have installed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cluster.client import Cluster
from slurm.site import BIN, Site

from .mom import CONFIG, PROFILE


class PbsSite(Site):
    """Hosts ``n1`` to ``n3`` are nodes, ``ctl`` is the server's."""

    options = ("--pbs", "--profiledir", PROFILE)

    def claims(self, node: str) -> str:
        """What is claimed on a node, in whichever store there is."""
        return self.root(
            node, "sh", "-c", "find /var/lib/stager/*/leases -type f 2>/dev/null || true"
        )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The hosts; alice has an environment ``science``, which is where nobody finds it."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "state")
    try:
        cluster.up()
        site = PbsSite(cluster)
        site.install()
        settings = {"stager": f"{BIN}/stager", "limit": 60}
        for node in ("ctl", "n1", "n2", "n3"):
            site.place(node, CONFIG).write_text(json.dumps(settings))
        site.make_environment("alice", "science")
        yield site
    finally:
        cluster.down()


@pytest.fixture
def hidden(site: Site) -> Iterator[None]:
    """The original is gone."""
    origin = site.home("alice") / "envs" / "science"
    away = origin.with_name("hidden")
    origin.rename(away)
    yield
    away.rename(origin)


@pytest.fixture
def nothing_is_left(site: PbsSite) -> Iterator[None]:
    """After each job: no state, no claim, no process; and no tree, so that each starts cold."""
    yield
    # Of a real PBS no two jobs have the same number, as recordings of one have.
    site.shell("alice", "rm -f .local/share/stager/tmp/job-*")
    for node in ("n1", "n2", "n3"):
        assert site.job_states(node) == []
        assert site.claims(node) == ""
        site.cluster.exec(node, "alice", [f"{BIN}/stager", "collect", "--all"], check=False)
        running = site.root(
            node, "sh", "-c", "ps -eo args | grep -E '[s]tager hook|[s]quashfuse' || true"
        )
        assert running == ""
