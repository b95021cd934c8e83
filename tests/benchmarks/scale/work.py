"""What one node's start asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one node's start asks for, measured on one node of the cluster.

    Attributes:
        name: what is imported.
        operations: metadata operations of the import of all ranks on a cold node.
        serial: how many of these the import waits for, one after the other.
        touched: bytes that the import reads.
        files: files of the environment.
        everything: operations of reading the whole environment file by file.
        size: bytes of the environment.
        image: bytes of our image.
        archive: bytes of the tar.gz.
        imported: seconds of the import from a warm local directory.
        untarred: seconds to unpack the tar.gz and run what repairs it.
        staged: seconds until a job's script starts whose Prolog stages, without the latency of its
            operations and without the transfer: Slurm's own, checks, mount, claim.
        hit: the same where it is staged already.
        through_mount: seconds more that the first import takes through the mount.
        asked: our operations on a node that stages.
        asked_hit: on a node where it is staged already.
        asked_sending: of the node that sends the image by sbcast; before that, as many as where a
            node stages.
        asked_receiving: of each other node then, after it has the image.
        asked_recipe: of the one node that reads the archive.
        empty: seconds until a job's script starts that has no Prolog of ours.
        unpacked: seconds until one node has read and unpacked the archive; 0 where nobody looked.
        rsynced: seconds in which one node copies what that one has unpacked.
    """

    name: str
    operations: int
    serial: int
    touched: int
    files: int
    everything: int
    size: int
    image: int
    archive: int
    imported: float
    untarred: float
    staged: float
    hit: float
    through_mount: float
    asked: int
    asked_hit: int
    asked_sending: int
    asked_receiving: int
    asked_recipe: int
    empty: float = 0.0
    unpacked: float = 0.0
    rsynced: float = 0.0
