"""Stands where the training would be: all processes meet, and tell where they run."""

import os
import sys

import torch
import torch.distributed as dist

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
total = torch.ones(1)
dist.all_reduce(total)
node, rank = os.environ.get("SLURMD_NODENAME", "-"), os.environ["RANK"]
print("rank", node, rank, sys.prefix, f"of {int(total)}", flush=True)
dist.destroy_process_group()
