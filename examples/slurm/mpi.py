"""Each rank tells where it runs; the first one tells how many have met."""

import os
import sys

from mpi4py import MPI

world = MPI.COMM_WORLD
prefixes = world.gather(sys.prefix)
print("rank", os.environ.get("SLURMD_NODENAME", "-"), world.rank, sys.prefix, flush=True)
if prefixes is not None:
    print("world", world.size, *sorted(set(prefixes)), flush=True)
