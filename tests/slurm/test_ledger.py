"""What a job asks of shared storage until its last rank has imported: each operation is counted.

All of the homes is on a file system that writes down what it is asked, on the nodes of the job
(``tests/benchmarks/metafs.py``): the original environment, the repository, the configuration,
``~/.local`` and the working directory. A lookup of one name in one directory is an operation, once
for each node; so is every open and every close. Reads of an image are data: they are listed apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.jobs import ENVIRONMENT, HOME, Started, make_environment, mounted, start
from benchmarks.ledger import Ledger

from .site import APPS, BIN, READABLE, Site

NODES = ("n1", "n2")
REPOSITORY = f"{HOME}/.local/share/stager"
WAY_TO_REPOSITORY = [
    ("lookup", HOME),
    ("lookup", f"{HOME}/.config"),  # the user's own configuration, of which there is none
    ("lookup", f"{HOME}/.local"),
    ("lookup", f"{HOME}/.local/share"),
    ("lookup", REPOSITORY),
]
SHOWN = f"{BIN}/stager inspect --repository {APPS}/stager --json"
rows: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def environment(site: Site) -> Iterator[None]:
    make_environment(site, "numpy")
    yield
    site.clear_stores()
    print("operations on the shared file system per node, from submission to the last import")
    print(*rows, sep="\n")


def tell(what: str, started: Started) -> None:
    for node in NODES:
        one = started.ledger.of(node)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(one.kinds().items()))
        rows.append(
            f"{what:45} {started.ranks // len(NODES)} ranks, {node}: {one.count():5}"
            f" ({one.requests()} RPCs of a Lustre client), {one.bytes() / 1e6:5.1f} MB; {kinds}"
        )


def asked(ledger: Ledger) -> Counter[tuple[str, str]]:
    return Counter((one.kind, one.path) for one in ledger.metadata())


def read(path: str) -> list[tuple[str, str]]:
    """What reading a file asks for where its directory is known, but not what is in there."""
    return [("lookup", path.rpartition("/")[0]), *((kind, path) for kind in _WHOLE)]


_WHOLE = ("lookup", "open", "close")


def shown(site: Site, name: str) -> tuple[str, str]:
    """The digest of a packed environment, and its image."""
    value = json.loads(site.shell("alice", f"{BIN}/stager inspect --json {name}"))
    return value["digest"], image_of(value)


def image_of(value: dict[str, Any]) -> str:
    """The name of an environment's only image."""
    (layer,) = value["layers"]
    image = layer["image"]
    return f"{layer['id']}-{image['crc32']:08x}.{image['format']}"


def in_turn(site: Site, way: str, **job: Any) -> dict[str, Started]:
    """Nodes where nothing is staged; the same again; and clients that know nothing of it."""
    site.clear_stores()
    with mounted(site, *NODES) as shared:
        cold = start(site, shared, way, **job)
        again = start(site, shared, way, **job)
    with mounted(site, *NODES) as shared:
        hit = start(site, shared, way, **job)
    return {"cold": cold, "again": again, "hit": hit}


def compare(
    started: dict[str, Started], name: str, image: str, found: list[tuple[str, str]]
) -> None:
    """Each node asks for what finds the environment, and where it is not staged for the image."""
    for node in NODES:
        ledgers = {when: asked(one.ledger.of(node)) for when, one in started.items()}
        assert ledgers["cold"] == Counter(found + read(f"{REPOSITORY}/images/{image}"))
        assert ledgers["hit"] == Counter(found)
        assert ledgers["again"] == Counter([("open", name), ("close", name)])


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_original_is_asked_for_thousands(site: Site, ranks: int) -> None:
    """That the ledger counts."""
    with mounted(site, *NODES) as shared:
        cold = start(site, shared, "direct", ranks=ranks)
        again = start(site, shared, "direct", ranks=ranks)
    tell("direct, cold", cold)
    tell("direct, again", again)
    for node in NODES:
        assert cold.prefixes == again.prefixes == {ENVIRONMENT}
        # numpy alone is about 170 files; what is opened is opened by each rank.
        assert cold.ledger.of(node).below(ENVIRONMENT).count() > 150 * ranks
        assert again.ledger.of(node).below(ENVIRONMENT).count() > 150 * ranks


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("image_format", ["squashfs", "tar.zst"])
@pytest.mark.parametrize("way", ["hook", "stage-run"])
def test_a_pinned_one(site: Site, way: str, image_format: str, ranks: int) -> None:
    """Nothing of the original is resolved, and what is asked for does not depend on the ranks."""
    name = f"measured-{image_format}"
    digest, image = shown(site, name)
    started = in_turn(site, way, ref=f"{name}@sha256:{digest}", ranks=ranks)
    manifest = f"{REPOSITORY}/manifests/{digest}.json"
    for node in NODES:
        for one in started.values():
            assert one.ledger.of(node).below(ENVIRONMENT).count() == 0
            assert ENVIRONMENT not in one.prefixes
    compare(started, manifest, image, WAY_TO_REPOSITORY + read(manifest))
    for when, one in started.items():
        tell(f"{way}, {image_format}, pinned, {when}", one)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("image_format", ["squashfs", "tar.zst"])
def test_at_most_ten_more_than_an_empty_job(site: Site, image_format: str, ranks: int) -> None:
    """By name, where nobody looks for changes: what ``cli_filter.lua`` adds to a directive."""
    site.clear_stores()
    with mounted(site, *NODES) as shared:
        empty = start(site, shared, "empty", ranks=ranks)
    with mounted(site, *NODES) as shared:
        ref = f"measured-{image_format}?on_stale=ignore"
        cold = start(site, shared, "hook", ref=ref, ranks=ranks)
    tell("empty job", empty)
    tell(f"hook, {image_format}, by name, ignore, cold", cold)
    for node in NODES:
        assert cold.ledger.of(node).below(ENVIRONMENT).count() == 0
        assert ENVIRONMENT not in cold.prefixes
        more = cold.ledger.of(node).requests() - empty.ledger.of(node).requests()
        assert 0 < more <= 10


def test_sent_by_sbcast(site: Site) -> None:
    """One node reads the image; each other one asks for the manifest, and for nothing else."""
    digest, image = shown(site, "measured-squashfs")
    site.clear_stores()
    with mounted(site, *NODES) as shared:
        started = start(site, shared, "sbcast", ref=f"measured-squashfs@sha256:{digest}")
    tell("activate --via sbcast, pinned, cold", started)
    sender, other = (started.ledger.of(node) for node in NODES)
    read_once = sender.below(f"{REPOSITORY}/images/{image}")
    assert read_once.kinds()["open"] == 1
    assert read_once.bytes() > 1 << 20
    manifest = f"{REPOSITORY}/manifests/{digest}.json"
    assert asked(other) == Counter(WAY_TO_REPOSITORY + read(manifest))
    assert other.bytes() < 1 << 16


def looking(site: Site) -> list[tuple[str, str]]:
    """What a look whether the original changed asks for."""
    (library,) = (site.home("alice") / "envs/measured/lib").iterdir()
    looked = [
        f"{HOME}/envs",
        ENVIRONMENT,
        f"{ENVIRONMENT}/pyvenv.cfg",
        f"{ENVIRONMENT}/bin",
        f"{ENVIRONMENT}/lib",
        f"{ENVIRONMENT}/lib/{library.name}",
        f"{ENVIRONMENT}/lib/{library.name}/site-packages",
    ]
    return [("lookup", path) for path in looked]


@pytest.mark.parametrize("way", ["hook", "stage-run"])
def test_by_name(site: Site, way: str) -> None:
    """The one question more is whether the original changed, once for each node."""
    _digest, image = shown(site, "measured-squashfs")
    started = in_turn(site, way)
    ref = f"{REPOSITORY}/refs/measured-squashfs"
    compare(started, ref, image, WAY_TO_REPOSITORY + read(ref) + looking(site))
    for when, one in started.items():
        tell(f"{way}, squashfs, by name, {when}", one)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("ranks", [2, 8])
def test_one_of_the_sites(site: Site, ranks: int, checked: bool) -> None:
    """Root asks for the directory that the user had no reason to ask for, and for nothing twice.

    Whether the original changed makes no difference but a warning: the first node looks.
    """
    with site.published_for_all("central", *NODES) as tree:
        script = f"{site.publish} --name measured-site {ENVIRONMENT} >/dev/null"
        script += f"; {READABLE}"
        value = json.loads(site.root("ctl", "sh", "-ec", f"{script}; {SHOWN} measured-site"))
        image = f"{APPS}/stager/images/{image_of(value)}"
        with mounted(site, *NODES) as shared:
            ref = "measured-site" + ("?on_stale=ignore" if checked else "")
            started = start(site, shared, "hook", ref=ref, ranks=ranks)
        tell(f"hook, the site's, by name{', ignore' if checked else ''}, cold", started)
        missing = [("lookup", f"{REPOSITORY}/refs"), ("lookup", f"{REPOSITORY}/refs/measured-site")]
        way = [("lookup", APPS), ("lookup", f"{APPS}/stager")]
        manifest = read(f"{APPS}/stager/refs/measured-site")
        again = [("open", manifest[-1][1]), ("close", manifest[-1][1])]
        (prefix,) = started.prefixes
        assert prefix.rpartition("/")[0] == tree.rpartition("/")[0]
        for node in NODES:
            looked = [] if checked or node != NODES[0] else looking(site)
            assert started.ledger.of(node).below(ENVIRONMENT).count() == max(0, len(looked) - 1)
            found = WAY_TO_REPOSITORY + missing + way + manifest + again + read(image) + looked
            assert asked(started.ledger.of(node)) == Counter(found)


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_working_directory_is_the_jobs_own(site: Site, ranks: int) -> None:
    """Without ``-P`` Python lists the directory it looks for modules in first, in each rank."""
    with mounted(site, *NODES) as shared:
        start(site, shared, "hook", ranks=ranks)
        again = start(site, shared, "hook", ranks=ranks, python="python")
    tell("hook, by name, again, without python -P", again)
    for node in NODES:
        found = asked(again.ledger.of(node).below(HOME))
        assert found["opendir", HOME] == ranks
