#!/bin/bash
# On any cluster: stage-run in the step. On each node one rank stages, the others wait for it.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2

srun stage-run --env science python where.py
