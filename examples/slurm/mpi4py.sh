#!/bin/bash
# MPI: the environment has mpi4py, the MPI library is the cluster's own. Where Slurm is built with
# PMIx, `srun --mpi=pmix` takes the place of mpirun.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2

stage-run --env science mpirun python mpi.py
