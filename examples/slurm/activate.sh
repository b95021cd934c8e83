#!/bin/bash
# On any cluster: activated once for all nodes, as with `source bin/activate`. The rest of the
# script, and the programs it calls, need not know.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2

eval "$(stager activate science)" || exit 1

python where.py before
srun python where.py
