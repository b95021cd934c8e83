#!/bin/bash
# An array: the first task on a node stages, later ones find the tree there.
#SBATCH --array=0-7
#SBATCH --ntasks=1

stage-run --env science python where.py "$SLURM_ARRAY_TASK_ID"
