"""Tell where this rank runs, and from which copy of the environment."""

import os
import sys

node = os.uname().nodename
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PBS_TASKNUM", "-")
print("rank", node, rank, sys.prefix, *sys.argv[1:], flush=True)
