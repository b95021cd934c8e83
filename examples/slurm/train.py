"""Stands where the training would be: all processes meet, and tell where they run."""

import os
import sys

import torch
import torch.distributed as dist

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
total = torch.ones(1, device=f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
dist.all_reduce(total)
node, rank = os.environ.get("SLURMD_NODENAME", "-"), os.environ["RANK"]
print("rank", node, rank, sys.prefix, f"of {int(total)}", flush=True)
dist.destroy_process_group()
