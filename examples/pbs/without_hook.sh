#!/bin/bash
# Where PBS has no hook of stager's: stages on all nodes of the job, then runs mpirun. Open MPI that was
# built without PBS has to be told the nodes, starts its ranks by ssh, and hands on what -x names.
#PBS -l select=3:ncpus=2:mpiprocs=2
#PBS -j oe

cd "$PBS_O_WORKDIR" || exit 1
stage-run --env science mpirun --hostfile "$PBS_NODEFILE" -x PATH -x VIRTUAL_ENV \
    python where.py
