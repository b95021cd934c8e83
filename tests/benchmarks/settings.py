"""What kinds of shared file systems :mod:`benchmarks.metafs` stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """A shared file system. Rates are for all nodes together and 0 where there is no limit.

    Attributes:
        rate: operations that the metadata service answers in a second.
        latency: seconds until one operation is answered, besides waiting for its turn.
        bandwidth: bytes of data in a second.
        node_bandwidth: the same, for one node.
        osts: object servers; a file lies on one of them, by its path.
        ost_bandwidth: bytes in a second of each.
        data_latency: seconds until one read is answered.
        wide: patterns (fnmatch) of paths below the mount: files that lie on all servers.
        stripe_size: bytes.
        callers: whether the ledger names the programs that asked (takes a moment for each).
    """

    name: str
    rate: float = 0.0
    latency: float = 0.0
    bandwidth: float = 0.0
    node_bandwidth: float = 0.0
    osts: int = 1
    ost_bandwidth: float = 0.0
    data_latency: float = 0.0
    wide: tuple[str, ...] = ("*/stager/images/*",)
    stripe_size: int = 1 << 20
    callers: bool = False

    @property
    def delays(self) -> bool:
        """Whether anything takes longer than it has to."""
        return any(
            (self.rate, self.latency, self.bandwidth, self.node_bandwidth, self.ost_bandwidth)
        )


# Rates and latencies of metadata, and the bandwidths, are those of the three settings that the
# project compares; a data RPC of the first is taken to be ten times as fast as one of its metadata
# (measured on no machine), of the others as fast.
NONE = Settings("none")
COLD_LUSTRE = Settings(
    "cold-lustre", rate=100e3, latency=10e-3, bandwidth=100e9, node_bandwidth=2.5e9,
    osts=64, ost_bandwidth=1.7e9, data_latency=1e-3,
)  # fmt: skip
FLASH = Settings(
    "flash", rate=500e3, latency=0.5e-3, bandwidth=100e9, node_bandwidth=2.5e9,
    osts=64, ost_bandwidth=1.7e9, data_latency=0.5e-3,
)  # fmt: skip
WEAK_NFS = Settings(
    "weak-nfs", rate=5e3, latency=2e-3, bandwidth=1e9, node_bandwidth=1e9, data_latency=2e-3,
)  # fmt: skip
ALL = {one.name: one for one in (NONE, COLD_LUSTRE, FLASH, WEAK_NFS)}
