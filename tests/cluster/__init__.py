"""A real Slurm cluster on one machine, for tests: see README.md beside this file."""

from __future__ import annotations

from .client import Cluster, ClusterError

__all__ = ["Cluster", "ClusterError"]
