#!/bin/bash
# A heterogeneous job: stage-run in its script stages on the nodes of all components.
#SBATCH --nodes=1 --ntasks=1
#SBATCH hetjob
#SBATCH --nodes=2 --ntasks-per-node=2

stage-run --env science srun --het-group=0,1 python where.py
