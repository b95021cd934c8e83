#!/bin/bash
# PyTorch's launcher on several nodes: one on each, which starts a process for each GPU.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# `torchrun` is short for `python -m torch.distributed.run`.
stage-run --env science srun python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=2 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
    train.py
