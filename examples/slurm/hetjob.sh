#!/bin/bash
# A heterogeneous job: stage-run in its script stages on the nodes of all components.
#SBATCH --nodes=1 --ntasks=1
#SBATCH hetjob
#SBATCH --nodes=2 --ntasks-per-node=2

stage-run --env science srun --het-group=0 python where.py : \
    --het-group=1 --nodes=2 --ntasks=4 python where.py
