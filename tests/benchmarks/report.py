"""Writes docs/performance from recorded runs: tables, the simulation and the plots.

make performance        from the runs that are committed in docs/performance
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' own packages

from benchmarks.scale import closed, published, simulate
from benchmarks.scale.work import Work
from benchmarks.settings import ALL, COLD_LUSTRE

DOCS = Path(__file__).resolve().parents[2] / "docs"
DATA = DOCS / "performance"
NODES = (1, 8, 64, 128, 1024, 4096, 9408)
SHOWN = ("cold-lustre", "flash", "weak-nfs")
OURS = ("ours", "ours, checked", "ours, site")
_AFTER_SENDING, _RECEIVING = 3, 4
"""Operations of the node that has sent by sbcast, and of each other, where nobody looked: the same
for numpy and torch from a venv and for numpy from a conda environment."""

_IN_SHORT = ("starts-summary", "starts-by-run")
"""What performance.md shows; the rest is in performance/rig.md."""

_ALL_STARTS = """# Starts of jobs: every cell

Written by `make performance` from the recorded runs, `starts-*.jsonl`. What the words mean, and
how far to trust the cells, is in [performance.md](../performance.md). Seconds are medians; in
brackets the shortest and the longest of n starts. A run's load is that of the minute before."""

Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    """What was recorded, but for starts that were measured again since the rig was mended."""
    return newest([json.loads(line) for line in path.read_text().splitlines()])


def newest(found: list[Row]) -> list[Row]:
    """Leave out each cell's starts by an older rig than its newest (``RIG`` in job_starts.py)."""
    latest: dict[tuple[str, int, str], int] = defaultdict(int)
    for machine, *starts in runs(found):
        for one in starts:
            latest[_cell(one)] = max(latest[_cell(one)], machine.get("rig", 1))
    result = []
    for machine, *starts in runs(found):
        kept = [one for one in starts if latest[_cell(one)] == machine.get("rig", 1)]
        result += [machine, *kept] if kept else []
    return result


def _cell(row: Row) -> tuple[str, int, str]:
    return row["setting"], row["nodes"], row["strategy"]


def grouped(found: list[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """Starts by setting, number of nodes and strategy."""
    result: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in found:
        if "strategy" in row:
            result[_cell(row)].append(row)
    return result


def cold(found: list[Row]) -> dict[tuple[int, str], list[Row]]:
    """Starts at the setting that is summed up, simulated from and drawn: by nodes and strategy."""
    result: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for (setting, nodes, name), those in grouped(found).items():
        if setting == COLD_LUSTRE.name:
            result[nodes, name] = those
    return result


def whole(row: Row) -> float:
    return float(sum(row["seconds"].values()))


def median(starts: list[Row], phase: str = "") -> float:
    if phase:
        return statistics.median(row["seconds"].get(phase, 0.0) for row in starts)
    return statistics.median(map(whole, starts))


def work(found: list[Row]) -> Work:
    """What the simulation is fed with: all of it was measured with as few nodes as there are."""
    starts = cold(found)
    environment = next(row["environment"] for row in found if "environment" in row)
    count = min(nodes for nodes, name in starts if name == "direct")
    one = {name: starts[count, name] for name in ("direct", "recipe")}
    copied = starts[count, "cp -r"]
    ours, warm = starts[count, "ours"], starts[count, "ours, warm"]
    node = one["direct"][0]
    several = min((nodes for nodes, name in starts if name == "rsync" and nodes > 1), default=0)
    fanned = starts[several, "rsync"]
    imported = median(warm, "import")
    asked, hit = ours[0]["operations"], warm[0]["operations"]
    sending, receiving = _sbcast(starts, asked)
    return Work(
        name=found[0]["workload"],
        operations=node["operations"],
        # Ranks ask at the same time, and for each other.
        serial=round((median(one["direct"], "import") - imported) / COLD_LUSTRE.latency),
        touched=node["read"] // count,
        files=environment["files"],
        everything=copied[0]["operations"] if copied else 0,
        size=environment["size"],
        image=environment["image"],
        archive=environment["archive"],
        imported=imported,
        untarred=median(one["recipe"], "untar") + median(one["recipe"], "unpack"),
        # The simulation adds operations and transfer again, by what the setting says of them.
        staged=max(
            0.0,
            median(ours, "job")
            - asked * COLD_LUSTRE.latency
            - closed.transfer(environment["image"], COLD_LUSTRE),
        ),
        hit=max(0.0, median(warm, "job") - hit * COLD_LUSTRE.latency),
        through_mount=max(0.0, median(ours, "import") - imported),
        asked=asked,
        asked_hit=hit,
        asked_sending=sending,
        asked_receiving=receiving,
        asked_recipe=one["recipe"][0]["total"],
        empty=median(one["direct"], "job"),
        unpacked=median(fanned, "read") if fanned else 0.0,
        rsynced=median(fanned, "rsync") if fanned else 0.0,
    )


def _sbcast(starts: dict[tuple[int, str], list[Row]], asked: int) -> tuple[int, int]:
    """Operations of the node that sends the image, and of each other one."""
    counts = [nodes for nodes, name in starts if name == "ours, sbcast"]
    sending, receiving = asked + _AFTER_SENDING, _RECEIVING
    if counts:
        most = max(counts)
        row = starts[most, "ours, sbcast"][0]
        sending = row["operations"]
        if most > 1:
            receiving = round((row["total"] - sending) / (most - 1))
    return sending, receiving


def runs(found: list[Row]) -> Iterator[list[Row]]:
    """Yield what was recorded, by run: its machine, then its starts."""
    first = [number for number, row in enumerate(found) if "machine" in row]
    for start, end in itertools.zip_longest(first, first[1:]):
        yield found[start:end]


def machines(found: list[Row]) -> list[str]:
    """A table of runs: where, what each measured, and what the machine could do right then."""
    lines = [
        "| a run of, nodes | on | write, GB/s | read | zstd | from node to node | Python, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, *starts in runs(found):
        did: dict[str, set[int]] = defaultdict(set)
        for one in starts:
            did[one["setting"]].add(one["nodes"])
        cells = "; ".join(
            f"{setting} {', '.join(map(str, sorted(did[setting])))}" for setting in did
        )
        rates = row["calibration"]
        # The first runs did not measure the link.
        could = [
            f"{rates[name] / 1e9:.2f}" if name in rates else "-"
            for name in ("write", "read", "zstd", "link")
        ]
        lines.append(
            f"| {cells} | {row['machine']} | {' | '.join(could)} | {rates['python'] * 1000:.0f} |"
        )
    return lines


def measured(found: list[Row]) -> list[str]:
    """The table of one workload."""
    starts = grouped(found)
    lines = []
    for setting in SHOWN:
        counts = sorted({nodes for one, nodes, _ in starts if one == setting})
        if not counts:
            continue
        names = list(dict.fromkeys(name for one, _, name in starts if one == setting))
        head = " | ".join(f"{count} node{'s' if count > 1 else ''}" for count in counts)
        tags = sorted(
            {row["tag"] for key, those in starts.items() for row in those if key[0] == setting}
        )
        lines += [
            "",
            f"| {setting}, s [{', '.join(tags)}] | {head} | operations a node | MB read a node |",
        ]
        lines += ["|---" * (len(counts) + 3) + "|"]
        for name in names:
            by_count = {count: starts.get((setting, count, name), []) for count in counts}
            most = max(count for count, those in by_count.items() if those)
            operations = statistics.median(row["operations"] for row in by_count[most])
            read = statistics.median(row["read"] / most / 1e6 for row in by_count[most])
            cells = [_spread(those) for those in by_count.values()]
            lines.append(f"| {name} | {' | '.join(cells)} | {operations:,.0f} | {read:,.0f} |")
    return lines


def against(all_found: list[list[Row]]) -> list[str]:
    """How many times as long as ours the others took, at the cold setting.

    The median of the runs that had both: hours differ.
    """
    names = (
        "direct", "recipe", "squashfs in place", "ours, checked", "ours, site", "ours, warm",
    )  # fmt: skip
    lines = [f"| cold-lustre [dilated] | ours, s | {' | '.join(names)} |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for found in all_found:
        starts = cold(found)
        workload = found[0]["workload"]
        for count in sorted(nodes for nodes, name in starts if name == "ours"):
            ours = starts[count, "ours"]
            times = [_cold(run, count) for run in runs(found)]
            cells = []
            for name in names:
                ratios = [one[name] / one["ours"] for one in times if {name, "ours"} <= {*one}]
                cells.append(f"{statistics.median(ratios):.1f}" if ratios else "-")
            nodes = f"{count} node{'s' if count > 1 else ''}"
            lines.append(f"| {workload}, {nodes} | {median(ours):.2f} | {' | '.join(cells)} |")
    return lines


def _cold(run: list[Row], nodes: int) -> dict[str, float]:
    """What each strategy took in one run at the cold setting: medians."""
    return {name: median(those) for (count, name), those in cold(run).items() if count == nodes}


def by_run(all_found: list[list[Row]], nodes: int, what: str) -> list[str]:
    """What each run at the cold setting gave for the aims: nothing is mixed over hours.

    Args:
        all_found: what was recorded.
        nodes: with how many.
        what: the table's first heading.
    """
    plain = ("direct", "recipe", "squashfs in place")
    lines = [f"| {what} | n | {' | '.join((*plain, *OURS))} |"]
    lines += ["|---" * (len(plain) + len(OURS) + 2) + "|"]
    for found in all_found:
        for run in runs(found):
            times = _cold(run, nodes)
            if not {"ours", "recipe"} <= {*times}:
                continue
            cells = [f"{times[one]:.2f}" if one in times else "-" for one in plain]
            cells += [_ratios(times, one) for one in OURS]
            count = len(cold(run)[nodes, "ours"])
            lines.append(f"| {run[0]['workload']} | {count} | {' | '.join(cells)} |")
    return lines


def _ratios(times: dict[str, float], one: str) -> str:
    """A time, and how many times as long direct and the recipe took."""
    if one not in times:
        return "-"
    ratios = [f"{times[name] / times[one]:.1f}" for name in ("direct", "recipe") if name in times]
    return f"{times[one]:.2f} ({', '.join(ratios)} x)"


def _spread(those: list[Row]) -> str:
    if not those:
        return "-"
    times = sorted(map(whole, those))
    if len(times) == 1:
        return f"{times[0]:.2f}"
    return f"{median(those):.2f} ({times[0]:.2f} - {times[-1]:.2f}, n={len(times)})"


def simulated(one: Work) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """The table of a simulation, and its numbers by setting and strategy."""
    lines, numbers = [], {}
    for setting in SHOWN:
        head = " | ".join(f"{count:,}" for count in NODES)
        lines += ["", f"| {setting}, s [simulated] | {head} |"]
        lines += ["|---" * (len(NODES) + 1) + "|"]
        numbers[setting] = {}
        for name in simulate.STRATEGIES:
            if (name, 0) in (("cp -r", one.everything), ("rsync", one.rsynced)):
                continue  # was not measured
            times = [simulate.start(name, one, ALL[setting], count) for count in NODES]
            forms = [closed.FORMS[name](one, ALL[setting], count) for count in NODES]
            numbers[setting][name] = times
            cells = [f"{time:.1f} ({form:.1f})" for time, form in zip(times, forms)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, numbers


def foretold(workload: str, found: list[Row], numbers: dict[str, list[float]]) -> str:
    """How far the simulation is from what eight nodes were measured to take.

    Args:
        workload: its name.
        found: what was recorded.
        numbers: simulated seconds by strategy, for each of :data:`NODES`, at the cold setting.
    """
    starts = cold(found)
    cells = []
    for name in simulate.STRATEGIES:
        those = starts.get((8, name))
        simulated = numbers.get(name)
        if not those or not simulated:
            cells.append("-")
            continue
        cells.append(f"{simulated[NODES.index(8)] / median(those) - 1:+.0%}")
    return f"| {workload} | {' | '.join(cells)} |"


def draw(found: list[Row], numbers: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Seconds by nodes at the cold setting: measured as dots, simulated as lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stager"  # the same bytes every time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.5))
    starts = cold(found)
    for number, (name, times) in enumerate(numbers["cold-lustre"].items()):
        colour = f"C{number}"
        axes.plot(NODES, times, color=colour, label=name)
        dots = [
            (count, median(those))
            for (count, strategy), those in sorted(starts.items())
            if strategy == name
        ]
        if dots:
            axes.plot(*zip(*dots), "o", color=colour, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="nodes of eight ranks")
    axes.set_ylabel(f"seconds to the last rank's import of {found[0]['workload']}")
    axes.set_title("A cold start: measured (dots, dilated) and simulated (lines)")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    parts = {}
    recorded = {path: rows(path) for path in sorted(DATA.glob("starts-*.jsonl"))}
    parts["starts-summary"] = against([*recorded.values()])
    parts["starts-by-run"] = by_run([*recorded.values()], 8, "8 nodes, s [dilated]")
    real = rows(DATA / "two-ranks.jsonl")
    parts["two-ranks"] = [
        *machines(real), "", *by_run([real], 1, "a node of two ranks, s [real]"),
    ]  # fmt: skip
    parts["starts-foretold"] = [
        f"| simulated by measured, 8 nodes | {' | '.join(simulate.STRATEGIES)} |",
        "|---" * (len(simulate.STRATEGIES) + 1) + "|",
    ]
    pages = [_ALL_STARTS]
    for path, found in recorded.items():
        one = work(found)
        table, numbers = simulated(one)
        draw(found, numbers, DATA / f"{path.stem}.svg")
        if any(nodes == 8 for nodes, _ in cold(found)):
            parts["starts-foretold"].append(foretold(one.name, found, numbers["cold-lustre"]))
        pages += [
            "",
            f"## {one.name}",
            "",
            f"![Seconds until the last rank has imported, by nodes]({path.stem}.svg)",
            "",
            *machines(found),
            *measured(found),
            "",
            "Simulated from these (in brackets the closed form), seconds:",
            *table,
            "",
            f"What the simulation was fed with: `{json.dumps(asdict(one))}`",
        ]
    parts["published"] = published.tables()
    replace(DOCS / "performance.md", {name: parts.pop(name) for name in _IN_SHORT})
    replace(DATA / "rig.md", parts)
    (DATA / "starts.md").write_text("\n".join(pages) + "\n")


def replace(path: Path, parts: dict[str, list[str]]) -> None:
    """Put generated lines between their marks."""
    text = path.read_text()
    for name, lines in parts.items():
        first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(first)
        _, ended, after = rest.partition(last)
        if not found or not ended:
            raise SystemExit(f"{path} has no place for {name}: {first.strip()} ... {last.strip()}")
        text = before + first + "\n".join(lines).strip("\n") + "\n" + last + after
    path.write_text(text)


if __name__ == "__main__":
    main()
