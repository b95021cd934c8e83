#!/bin/bash
# On a cluster whose administrator has installed stager's hook: nothing but the resource. Every
# `python` of the job is the node-local one, and with `?strict` the job fails where it cannot be.
#PBS -l select=3:ncpus=2:mpiprocs=2
#PBS -l pyenv=science
#PBS -j oe

cd "$PBS_O_WORKDIR" || exit 1
pbsdsh -- python "$PBS_O_WORKDIR/where.py"
