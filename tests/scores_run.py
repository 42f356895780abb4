"""A training that can be killed, and goes on."""

import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mft_nb.mask import MFT
from mft_nb.trainer import MaskTrainer
from tests.models import CONFIG, tiny_bert, trainer_for


class Slow(TrainerCallback):
    """Leaves time for a kill after the first checkpoint."""

    def on_step_begin(self, args, state, control, **_):
        time.sleep(0.5 if state.global_step > 4 else 0)


def train(place: Path, slow: bool):
    """Train slowly, to be killed, or go on and save the scores."""
    torch.set_num_threads(1)
    mft = MFT(tiny_bert(dropout=0.1), CONFIG)
    folder = place / "run"
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_for(mft.model, folder, MaskTrainer, **options)
    if slow:
        trainer.add_callback(Slow())
    last = None if slow else get_last_checkpoint(folder)
    assert slow or last
    trainer.train(resume_from_checkpoint=last)
    torch.save([score.detach() for score in mft.scores], place / "scores.pt")
