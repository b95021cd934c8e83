"""``stager plan``: whether staging pays."""

from __future__ import annotations

import argparse
import os

from stager import estimate, lookup, manifest, ref, timings, transfer
from stager.cli.common import count, load_config, print_json, say, size
from stager.config import Config
from stager.errors import JOB, NotFoundError, StagerError, UsageError
from stager.estimate import Layer, Site, Way
from stager.fsutil import explain
from stager.repository import Published
from stager.staging import sitestore, trees
from stager.staging.store import EXTRACTED, Stamp, Store

_MOST_NODES = 1_000_000
"""More than any cluster has, and a number to calculate with."""


class _Elsewhere(Store):
    """A store that this node does not have, or cannot; others have one there."""

    def __init__(self, root: str) -> None:
        self.root = root

    def ready(self, layer_id: str) -> Stamp | None:
        """Nothing is: what is in a store that is not ours is not for us."""
        return None


def plan(arguments: argparse.Namespace) -> int:
    """Estimate a start from the original and a staged one; print both and what to do."""
    config = load_config(arguments)
    if arguments.nodes < 1:
        raise UsageError(f"-N cannot be {arguments.nodes}", hint="a number of nodes, such as 8")
    if arguments.nodes > _MOST_NODES:
        raise UsageError(
            f"-N cannot be more than {_MOST_NODES:,}", hint="a number of nodes, such as 8"
        )
    published = lookup.find(ref.parse(arguments.ref), config)
    node, write, why = _node(config)
    here = arguments.nodes == 1  # what this node has, others may not have
    place = sitestore.of(published, config) or node
    layers = [_layer(one, place, config, here=here) for one in published.manifest.layers]
    site, samples = _site(published, write or estimate.WRITE, config)
    direct = estimate.direct(layers, site, arguments.nodes)
    staged = estimate.staged(layers, site, arguments.nodes)
    advice = estimate.verdict(direct, staged)
    if arguments.json:
        print_json(
            {
                "ref": published.ref,
                "nodes": arguments.nodes,
                "advice": advice,
                "direct": direct._asdict(),
                "staged": staged._asdict(),
                "site": {**site._asdict(), "samples": samples, "write_timed": not why},
                "layers": [layer._asdict() for layer in layers],
            }
        )
        return 0
    nodes = count(arguments.nodes, "node")
    print(f"{published.manifest.name} on {nodes}, until all ranks have imported (estimated):")
    print(_line("direct", direct))
    print(_line("staged", staged))
    print(_advice(advice, direct, staged, layers))
    say(_basis(site, samples, why))
    return 0


def _node(config: Config) -> tuple[Store, float, str]:
    """This node's store, the bytes a second that it takes, and why they could not be timed.

    Plans are made on login nodes, too, which may have no place for a store.
    """
    place: str = config["store"]
    node: Store = _Elsewhere(place)
    if os.path.lexists(place):
        try:
            node = Store(place)
        except StagerError as error:
            return node, 0.0, error.message
        place = os.path.join(place, "tmp")
    while not os.path.lexists(place):  # looking makes none: it may be a slip of the pen
        place = os.path.dirname(place)
    try:
        return node, max(timings.writing(place), 1.0), ""
    except OSError as error:
        return node, 0.0, explain(error, f"write into {place}").message


def _layer(layer: manifest.Layer, node: Store, config: Config, *, here: bool) -> Layer:
    try:
        extracted = trees.choose(layer, node, config["stage.how"]) == EXTRACTED
    except StagerError:  # staging would say so
        extracted = True
    here = here and node.ready(layer.id) is not None
    return Layer(layer.files, layer.size, layer.image.size, extracted, here)


def _site(published: Published, write: float, config: Config) -> tuple[Site, int]:
    latency, samples = timings.latency(published.manifest.origin)
    images = {published.repository.image(one): one.image for one in published.manifest.layers}
    try:
        for path, image in images.items():
            transfer.require_size(path, os.stat(path).st_size, image)
        read = timings.reading([*images])
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the image {error.filename} is missing", hint="pack the environment again"
        ) from error
    except OSError as error:
        raise explain(error, "read the images", blame=JOB) from error
    site = Site(
        latency=latency if samples else estimate.LATENCY,
        rate=float(config["plan.metadata_rate"]),
        bandwidth=float(config["plan.bandwidth"]),
        read=max(read, 1.0),
        write=write,
    )
    return site, samples


def _line(name: str, way: Way) -> str:
    return (
        f"  {name}  {way.seconds:8.1f} s  {way.operations:>12,} metadata operations"
        f"  {size(way.read):>10} read"
    )


def _advice(advice: str, direct: Way, staged: Way, layers: list[Layer]) -> str:
    if all(layer.here for layer in layers):
        return "it is staged on this node already: a start from there costs next to nothing"
    if advice == "stage":
        return f"stage it: each start is about {direct.seconds - staged.seconds:.1f} s shorter"
    if advice == "direct":
        return (
            f"run it directly: staging takes about {staged.seconds - direct.seconds:.1f} s longer"
            " than it saves in one start; it pays off if a node starts it more than once"
        )
    return "either: the difference is below a second; staging puts less load on the file system"


def _basis(site: Site, samples: int, why: str) -> str:
    timed = f"{site.latency * 1000:.3g} ms an operation ({count(samples, 'name')} looked for here)"
    if not samples:
        timed = f"{site.latency * 1000:.0f} ms an operation (assumed: the original is not here)"
    wrote = f"assumed: {why}" if why else "to memory first, as staging does"
    return (
        f"stager: {timed}; reads {size(site.read)}/s here; writes {size(site.write)}/s ({wrote});"
        f" `plan.metadata_rate` {site.rate:,.0f}/s, `plan.bandwidth` {size(site.bandwidth)}/s"
    )
