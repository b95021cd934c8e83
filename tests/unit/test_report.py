"""The table of single runs: what is set beside each other was measured in one run."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from benchmarks import job_starts, report
from benchmarks.report import Row
from benchmarks.scale import simulate
from benchmarks.scale.rig import Start
from benchmarks.scale.strategies import strategies
from benchmarks.settings import COLD_LUSTRE

pytestmark = pytest.mark.unit


def start(strategy: str, *seconds: float, setting: str = "cold-lustre", nodes: int = 8) -> Row:
    phases = {f"phase {number}": one for number, one in enumerate(seconds)}
    return {"strategy": strategy, "setting": setting, "nodes": nodes, "seconds": phases}


MACHINE: Row = {"workload": "torch", "machine": "x86_64"}
ROWS = [
    MACHINE,
    start("direct", 60.0),
    start("recipe", 1.5, 10.5),
    start("ours", 1.0, 2.0),
    start("ours", 1.0, 4.0),
    start("ours", 1.0, 3.0),
    start("ours, site", 2.0),
    # Another run's direct and recipe are not ours.
    MACHINE,
    start("recipe", 8.0),
    start("ours", 2.0),
    start("ours", 100.0, setting="flash"),
    start("direct", 100.0, nodes=1),
    # Without a recipe there is nothing to compare.
    MACHINE,
    start("direct", 50.0),
    start("ours", 2.0),
]


def test_each_run_is_compared_with_itself() -> None:
    head, line, *cells = report.by_run([ROWS], 8, "8 nodes, s [dilated]")
    assert (
        head == "| 8 nodes, s [dilated] | n | direct | recipe | squashfs in place"
        " | ours | ours, checked | ours, site |"
    )
    assert line.count("|") == head.count("|")
    assert cells == [
        "| torch | 3 | 60.00 | 12.00 | - | 4.00 (15.0, 3.0 x) | - | 2.00 (30.0, 6.0 x) |",
        "| torch | 1 | - | 8.00 | - | 2.00 (4.0 x) | - | - |",
    ]


def test_what_a_mended_rig_measured_again_counts_alone() -> None:
    again: Row = {**MACHINE, "rig": 2}
    kept = [MACHINE, start("direct", 60.0), again, start("ours", 3.0), start("ours", 4.0)]
    found = [
        MACHINE, start("direct", 60.0), start("ours", 1.0), MACHINE, start("ours", 2.0), *kept[2:],
    ]  # fmt: skip
    assert report.newest(found) == kept


def test_a_summary_mixes_no_runs() -> None:
    _, _, *lines = report.against([ROWS])
    # Of direct the first run's 15 and the third's 25, of the recipe 3 and 4 of the first two.
    assert lines == ["| torch, 8 nodes | 3.00 | 20.0 | 3.5 | - | - | 0.5 | - |"]


def test_a_simulation_is_set_beside_what_was_measured() -> None:
    line = report.foretold("torch", ROWS, {"direct": [1.0, 66.0], "recipe": [1.0, 5.0]})
    # direct took 60 and 50 s, the recipe 12 and 8.
    assert line == "| torch | +20% | - | - | -50% | - | - | - |"


def test_both_programs_of_a_pipe_have_a_processor() -> None:
    """The peers' tar would else be as slow as if a node had one processor."""
    (recipe,) = (one for one in strategies("numpy", "/opt") if one.name == "recipe")
    processes = {phase.name: phase.processes(8) for phase in recipe.phases}
    assert processes == {"sbcast": 8, "mkdir": 8, "untar": 16, "import": 64}


def recorded(
    strategy: str,
    operations: int,
    *,
    setting: str = "cold-lustre",
    nodes: int = 1,
    total: int = 0,
    **seconds: float,
) -> Row:
    row = start(strategy, setting=setting, nodes=nodes)
    total = total or operations * nodes
    return {**row, "seconds": seconds, "operations": operations, "total": total, "read": 40_000_000}


# What one node of eight ranks takes, as in the records.
RECORD = [
    {**MACHINE, "environment": {"files": 3000, "size": 93e6, "image": 28e6, "archive": 29e6}},
    # Fewer nodes, of another setting: not what is looked for.
    recorded("direct", 1800, setting="flash", **{"job": 0.05, "import": 0.4}),
    recorded("direct", 1800, nodes=2, **{"job": 0.05, "import": 3.74}),
    recorded("recipe", 2, nodes=2, total=2, **{"job": 0.05, "untar": 0.7, "import": 0.19}),
    recorded("ours", 13, nodes=2, **{"job": 0.32, "import": 0.24}),
    recorded("ours, sbcast", 16, nodes=8, total=44, **{"job": 0.05, "import": 0.2}),
    recorded("ours, warm", 10, nodes=2, **{"job": 0.19, "import": 0.20}),
]


@pytest.mark.parametrize("strategy", ["direct", "ours", "ours, warm"])
def test_one_node_is_simulated_as_it_was_measured(strategy: str) -> None:
    (measured,) = (one for one in RECORD if one.get("strategy") == strategy and one["nodes"] == 2)
    simulated = simulate.start(strategy, report.work(RECORD), COLD_LUSTRE, 1)
    assert simulated == pytest.approx(report.whole(measured))


def test_what_each_node_asks_is_what_was_measured() -> None:
    work = report.work(RECORD)
    assert (work.asked, work.asked_hit, work.asked_recipe) == (13, 10, 2)
    assert (work.asked_sending, work.asked_receiving) == (16, 4)
    other = report.work([one for one in RECORD if one.get("strategy") != "ours, sbcast"])
    assert (other.asked_sending, other.asked_receiving) == (16, 4)
    one_node = recorded("ours, sbcast", 19, **{"job": 0.05, "import": 0.2})
    alone = report.work([*RECORD[:5], one_node, RECORD[6]])
    assert (alone.asked_sending, alone.asked_receiving) == (19, 4)


def test_no_part_of_a_start_is_less_than_nothing() -> None:
    fast = [
        {**one, "seconds": {**one["seconds"], "job": 0.01}} if "seconds" in one else one
        for one in RECORD
    ]
    work = report.work(fast)
    assert (work.staged, work.hit) == (0.0, 0.0)


def test_what_was_not_measured_has_no_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot, axes = MagicMock(), MagicMock()
    pyplot.subplots.return_value = (MagicMock(), axes)
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(pyplot=pyplot))
    lines = {"direct": [1.0] * len(report.NODES), "rsync": [2.0] * len(report.NODES)}
    report.draw(ROWS, {"cold-lustre": lines}, Path("starts.svg"))
    drawn = [call.args for call in axes.plot.call_args_list]
    assert drawn == [
        (report.NODES, lines["direct"]),
        ((1, 8), (100.0, 55.0), "o"),
        (report.NODES, lines["rsync"]),
    ]


def test_a_conclusion_of_what_was_started() -> None:
    """Those of ``--once`` were not, with the last number of nodes."""
    ours = Start("ours", "flash", 8, {"job": 2.0}, {"job": 1.0}, 13, 104, {}, 1, 1)
    told = job_starts.conclusion("numpy", 8, {"direct": [], "ours": [ours], "recipe": []})
    line = "numpy, 8 nodes of 8 ranks, flash [real]: ours 2.00 s (1.0 x), 13 requests a node"
    assert told == line
    other = Start("direct", "flash", 8, {"job": 2.0}, {"job": 1.0}, 13, 104, {}, 1, 1)
    told = job_starts.conclusion("numpy", 8, {"ours": [], "direct": [other]})
    assert told.endswith("direct 2.00 s, 13 requests a node")
    assert job_starts.conclusion("numpy", 8, {"ours": []}).startswith("numpy: nothing was started")
