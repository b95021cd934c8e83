#!/bin/bash
# One task for each line of the job's list of nodes. The first on a node stages, the others wait for
# it. pbsdsh hands on no variables, so that the environment is named.
#PBS -l select=3:ncpus=2:mpiprocs=2
#PBS -j oe

pbsdsh -- stage-run --env science python "$PBS_O_WORKDIR/where.py"
