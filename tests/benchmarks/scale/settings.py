"""The shared file systems that starts are measured and simulated on, and what one node offers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A shared file system.

    Attributes:
        name: what it is called in results.
        latency: seconds of one metadata operation.
        rate: metadata operations a second for all nodes.
        bandwidth: bytes a second for all nodes.
    """

    name: str
    latency: float
    rate: float
    bandwidth: float


COLD = Setting("cold-lustre", 0.010, 100_000, 100e9)
FLASH = Setting("flash", 0.0005, 500_000, 100e9)
WEAK = Setting("weak-nfs", 0.002, 5_000, 1e9)
SETTINGS = {one.name: one for one in (COLD, FLASH, WEAK)}

LINK = 2.5e9
"""Bytes a second of one node's stream from the file system or another node: one TCP stream of the
sites that published one (22.5 Gb/s by iperf3 in EESSI's tutorial, 3.3 GB/s in ezpz's logs)."""


@dataclass(frozen=True)
class Work:
    """What one node's start asks for, measured on one node of the cluster.

    Attributes:
        name: what is imported.
        operations: metadata operations of the import on a cold node, whatever its ranks.
        touched: bytes that the import reads.
        files: files of the environment.
        everything: operations of reading the whole environment file by file.
        size: bytes of the environment.
        image: bytes of our image.
        archive: bytes of the tar.gz.
        imported: seconds of the import from a warm local directory.
        untarred: seconds to unpack the tar.gz and run what repairs it.
        staged: seconds of our staging beside the transfer: checks, mount, claim.
        through_mount: seconds more that the first import takes through the mount.
        extracted: seconds that a tar.zst takes from local memory to a ready tree.
        asked: our operations on a node that stages.
    """

    name: str
    operations: int
    touched: int
    files: int
    everything: int
    size: int
    image: int
    archive: int
    imported: float
    untarred: float
    staged: float
    through_mount: float
    extracted: float
    asked: int
