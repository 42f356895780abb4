"""A training that can be killed; `python -m tests.scores_run FOLDER slow|resume|whole`."""

import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mft_nb.mask import MFT
from tests.test_engine import CONFIG, tiny_bert, trainer_for


class Slow(TrainerCallback):
    """Leaves time for a kill after the first checkpoint."""

    def on_step_begin(self, args, state, control, **_):
        time.sleep(0.5 if state.global_step > 4 else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, how = Path(sys.argv[1]), sys.argv[2]
    mft = MFT(tiny_bert(dropout=0.1), CONFIG)
    folder = place / ("whole" if how == "whole" else "run")
    trainer = trainer_for(mft.model, folder, save_strategy="steps", save_steps=4)
    if how == "slow":
        trainer.add_callback(Slow())
    last = get_last_checkpoint(folder) if how == "resume" else None
    assert (how == "resume") == (last is not None)
    trainer.train(resume_from_checkpoint=last)
    torch.save([score.detach() for score in mft.scores], place / f"{how}.pt")
