"""Mask training under Accelerate in two processes, by two launchers; for test_engine.

The launchers are called as functions, in a fork that has the imports: `torchrun` calls the first
with a script, and the second is the one that Accelerate has for tests.
"""

from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mft_nb.mask import MFT
from tests.models import CONFIG, Rows, tiny_bert


def train_epochs(mft, size, accelerator=None):
    """Two epochs over the rows, `size` of them a step in each process."""
    model, optimizer = mft.model, torch.optim.AdamW(mft.trainable, lr=0.02, weight_decay=0)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=size)
    if accelerator:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    backward = accelerator.backward if accelerator else torch.Tensor.backward
    for _ in range(2):
        for rows in loader:
            backward(model(**rows).loss)
            optimizer.step()
            optimizer.zero_grad()


def work(folder):
    """Be one of two processes, and leave its mask in the folder."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    mft = MFT(tiny_bert(), CONFIG)
    train_epochs(mft, 6, accelerator)
    torch.save(dict(mft.bitmask()), Path(folder) / f"{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()


def by_torchrun(folder):
    """Two processes of one `torchrun --standalone`."""
    nodes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "run_id": "two"}
    meet = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    elastic_launch(LaunchConfig(**nodes, **meet), work)(folder)


def by_accelerate(folder):
    """Two processes of Accelerate's launcher for tests."""
    debug_launcher(work, (folder,), num_processes=2)
