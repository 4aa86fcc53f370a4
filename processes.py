"""
The processes that torchrun has started, or this one alone: which one this is, of how many, and one object for all.
"""

import os
import sys

import torch.distributed as dist

from configurator import under_torchrun

rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if under_torchrun() else (0, 1)


def share(x=None):
    """Waits for all processes. Returns the first one's x in each."""
    if world == 1:
        return x
    box = [x]
    try:
        dist.broadcast_object_list(box)
        dist.barrier()
    except RuntimeError:  # another process has failed, and has said why
        sys.exit(1)
    return box[0]
