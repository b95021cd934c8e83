#!/bin/bash
# On any PBS, Torque included: stages on all nodes of the job, then runs mpirun. Open MPI starts its
# ranks by ssh where it does not know PBS, and hands on what -x names.
#PBS -l select=3:ncpus=2:mpiprocs=2
#PBS -j oe

cd "$PBS_O_WORKDIR" || exit 1
stage-run --env science mpirun -x PATH -x VIRTUAL_ENV python where.py
