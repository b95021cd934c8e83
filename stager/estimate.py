"""Whether staging pays: how long a start takes directly and staged, as a model of a few numbers.

What a job waits for until its last rank has imported, without the processor time of the import
itself, which is the same for both::

    direct   the slowest of: one node's operations one after the other, all nodes' operations at
             the rate of the metadata service, the bytes that the import reads
    staged   the image at the speed of the slowest of network, disk and the shared file system,
             then its extraction, or reading what the import needs through the mount

``docs/performance.md`` says how the constants were measured, and what the model is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LATENCY = 0.001
"""Seconds of one metadata operation where none could be timed: between a busy Lustre's 10 ms and
an idle flash file system's 0.5 ms."""
WRITE = 1e9
"""Bytes a second to a node's own disk where none could be timed: between SATA's 0.5 GB and the 2 GB
of NVMe."""

_START_FILES = 400
"""Metadata operations of a Python that imports one package."""
_TOUCHED_FILES = 0.1
"""Metadata operations of an import for each file of the environment: 3,400 of 34,348 for torch."""
_TOUCHED_BYTES = 0.1
"""Part of an environment's bytes that an import reads: 5 % for torch, 14 % for all it may use."""
_OPERATIONS_STAGED = 18
"""Metadata operations of a node that stages by name; `tests/slurm/test_ledger.py` counts them."""
_FIXED = 0.5
"""Seconds to start, verify, mount and claim."""
_MOUNTED = 0.5e9
"""Bytes a second through a squashfuse mount that is read for the first time."""
_CREATED = 30e-6
"""Seconds for each file that is extracted to a local disk."""
_CLOSE = 1.0
"""Seconds of a difference that is none."""


class Layer(NamedTuple):
    """What matters of one layer.

    Attributes:
        files: number of files.
        size: bytes, unpacked.
        image: bytes of its image.
        extracted: whether it has to be extracted, because it cannot be mounted.
        here: it is staged on this node already.
    """

    files: int
    size: int
    image: int
    extracted: bool = False
    here: bool = False


class Site(NamedTuple):
    """What the shared file system and a node do.

    Attributes:
        latency: seconds of one metadata operation.
        rate: metadata operations a second, for all nodes together.
        bandwidth: bytes a second, for all nodes together.
        read: bytes a second that one node reads from it.
        write: bytes a second to a node's own disk.
    """

    latency: float
    rate: float
    bandwidth: float
    read: float
    write: float


class Way(NamedTuple):
    """One way to start.

    Attributes:
        seconds: until the last rank's import, without its processor time.
        operations: metadata operations of all nodes on the shared file system.
        read: bytes of all nodes from it.
    """

    seconds: float
    operations: int
    read: int


def direct(layers: Sequence[Layer], site: Site, nodes: int) -> Way:
    """Every node imports from the shared file system.

    Args:
        layers: the environment's.
        site: what was timed, and what the site's configuration says.
        nodes: how many start at once.
    """
    operations = _START_FILES + int(_TOUCHED_FILES * sum(one.files for one in layers))
    touched = int(_TOUCHED_BYTES * sum(one.size for one in layers))
    seconds = max(
        operations * site.latency,
        nodes * operations / site.rate,
        touched / site.read,
        nodes * touched / site.bandwidth,
    )
    return Way(seconds, nodes * operations, nodes * touched)


def staged(layers: Sequence[Layer], site: Site, nodes: int) -> Way:
    """Every node reads the images that it lacks, once, and imports from its own disk.

    Where one node starts, what is staged on it already is not read again.
    """
    new = [one for one in layers if not one.here]
    image = sum(one.image for one in new)
    seconds = _OPERATIONS_STAGED * max(site.latency, nodes / site.rate)
    if new:
        seconds += _FIXED + max(image / min(site.read, site.write), nodes * image / site.bandwidth)
    for one in new:
        if one.extracted:
            seconds += one.size / site.write + one.files * _CREATED
        else:
            seconds += _TOUCHED_BYTES * one.size / _MOUNTED
    return Way(seconds, nodes * _OPERATIONS_STAGED, nodes * image)


def verdict(one: Way, other: Way) -> str:
    """What to do: ``stage``, ``direct``, or ``either`` where the difference is not to be felt.

    Args:
        one: the direct start.
        other: the staged one.
    """
    if abs(one.seconds - other.seconds) < _CLOSE:
        return "either"
    return "stage" if other.seconds < one.seconds else "direct"
