"""Mask training under Accelerate; started by two launchers from test_engine.

Argument: the folder for the masks.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    mft = MFT(tiny_bert(), CONFIG)
    train_epochs(mft, 6, accelerator)
    torch.save(dict(mft.bitmask()), Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
