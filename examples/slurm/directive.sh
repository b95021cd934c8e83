#!/bin/bash
# On a cluster whose administrator has installed stager's hooks: nothing but the comment. Every
# `python` of the job is the node-local one, and with `?strict` the job fails where it cannot be.
#SBATCH --comment=pyenv:science
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2

srun python where.py
