"""The simulator agrees with the closed forms where nothing queues, and where one queue decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scale import closed, published, simulate
from benchmarks.scale.work import Work
from benchmarks.settings import COLD_LUSTRE, FLASH, WEAK_NFS, Settings

pytestmark = pytest.mark.unit

WORK = Work(
    name="torch", operations=9000, serial=3400, touched=90_000_000, files=34_348,
    everything=110_000, size=1_740_000_000, image=486_000_000, archive=600_000_000,
    imported=2.3, untarred=20.0, staged=0.3, hit=0.1, through_mount=0.5, asked=13, asked_hit=10,
    asked_sending=18, asked_receiving=7, asked_recipe=2, empty=0.05, unpacked=25.0, rsynced=4.0,
)  # fmt: skip


@pytest.mark.parametrize("setting", [COLD_LUSTRE, FLASH, WEAK_NFS], ids=lambda one: one.name)
@pytest.mark.parametrize("strategy", simulate.STRATEGIES)
def test_one_node_does_not_queue(strategy: str, setting: Settings) -> None:
    simulated = simulate.start(strategy, WORK, setting, 1)
    assert simulated == pytest.approx(closed.FORMS[strategy](WORK, setting, 1), rel=0.1)


@pytest.mark.parametrize(
    "strategy", ["direct", "ours", "ours, sbcast", "ours, warm", "recipe", "rsync"]
)
def test_thousands_wait_for_the_one_bottleneck(strategy: str) -> None:
    simulated = simulate.start(strategy, WORK, WEAK_NFS, 4096)
    assert simulated == pytest.approx(closed.FORMS[strategy](WORK, WEAK_NFS, 4096), rel=0.05)


@pytest.mark.parametrize("nodes", [1, 4096])
def test_of_a_recipe_one_node_asks(nodes: int) -> None:
    simulated = simulate.start("recipe", WORK, WEAK_NFS, nodes)
    rest = closed.sbcast(WORK.archive, nodes) + WORK.empty + WORK.untarred + WORK.imported
    assert simulated - rest == pytest.approx(2 * WEAK_NFS.latency)


def test_each_way_of_ours_asks_what_it_does() -> None:
    """One node: what it asks takes its latency, and nothing else does."""
    slow = replace(COLD_LUSTRE, latency=COLD_LUSTRE.latency + 1)
    longer = {
        strategy: simulate.start(strategy, WORK, slow, nodes)
        - simulate.start(strategy, WORK, COLD_LUSTRE, nodes)
        for strategy, nodes in (("ours", 1), ("ours, warm", 1), ("ours, sbcast", 1))
    }
    assert longer == pytest.approx({"ours": 13, "ours, warm": 10, "ours, sbcast": 18})
    # Who receives asks when who sends has sent.
    several = [simulate.start("ours, sbcast", WORK, one, 8) for one in (COLD_LUSTRE, slow)]
    assert several[1] - several[0] == pytest.approx(13 + 7)


@pytest.mark.parametrize("strategy", ["direct", "ours"])
@pytest.mark.parametrize("setting", [COLD_LUSTRE, FLASH], ids=lambda one: one.name)
def test_more_nodes_are_never_faster(strategy: str, setting: Settings) -> None:
    times = [simulate.start(strategy, WORK, setting, nodes) for nodes in (1, 16, 256, 1024)]
    assert times == sorted(times)


def test_a_published_fan_out_comes_out_as_it_was_measured_on_another_machine() -> None:
    (fan_out,) = (one for one in published.SERIES if one.strategy == "rsync")
    for nodes, measured, simulated in fan_out.compared():
        assert simulated == pytest.approx(measured, rel=0.1), nodes
    found = {nodes: simulated for nodes, _, simulated in fan_out.compared()}
    slope = (found[4096] - found[256]) / (4096 - 256)
    assert slope == pytest.approx(0.161, rel=0.1)  # seconds for each node more


@pytest.mark.parametrize("strategy", ["recipe", "direct"])
def test_a_published_recipe_on_eight_nodes(strategy: str) -> None:
    (one,) = (one for one in published.SERIES if one.strategy == strategy and 8 in one.seconds)
    ((_, measured, simulated),) = one.compared()
    assert simulated == pytest.approx(measured, rel=0.15)
