"""Mask training under Accelerate; started by torchrun from test_engine.

Arguments: the folder for the masks, and the rows of a batch in each process.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from mft_nb.mask import MFT
from tests.test_engine import CONFIG, Rows, tiny_bert

if __name__ == "__main__":
    torch.set_num_threads(1)
    place, size = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    mft = MFT(tiny_bert(), CONFIG)
    first = mft.bitmask()
    optimizer = torch.optim.AdamW(mft.trainable, lr=0.02, weight_decay=0)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=size)
    model, optimizer, loader = accelerator.prepare(mft.model, optimizer, loader)
    for _ in range(2):
        for rows in loader:
            accelerator.backward(model(**rows).loss)
            optimizer.step()
            optimizer.zero_grad()
    mask = mft.bitmask()
    name = f"{accelerator.num_processes}-{accelerator.process_index}"
    torch.save(dict(mask), place / f"{name}.pt")
    if accelerator.is_main_process:
        (place / "moved.json").write_text(json.dumps((mask ^ first).kept))
    accelerator.wait_for_everyone()
