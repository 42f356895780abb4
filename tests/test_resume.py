"""A mask training that was cut off ends with the very mask of one that was not."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from mft_nb.data import load_snippets
from mft_nb.mask import MFT, MaskConfig
from mft_nb.model import load_classifier

CONFIG = MaskConfig(start="normal", learning_rate=5e-3, dropout=True, l1=1e-4, batch_size=8)


class Crash(TrainerCallback):
    """Stops a run after its tenth step, in the middle of its second epoch."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 10:
            raise KeyboardInterrupt


def fit(config=CONFIG, **options):
    """Twelve steps of MFT on 64 rows, two epochs."""
    model, tokenizer = load_classifier("minilm")
    mft = MFT(model, config)
    rows = load_snippets()["train"].select(range(48))
    history = mft.fit(tokenizer, rows, max_steps=12, eval_every=4, progress=False, **options)
    return mft, history


def test_resumed_equals_never_stopped(tmp_path):
    whole, history = fit()
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        fit(folder=folder, save_every=3, callbacks=(Crash(),))
    assert folder.exists()
    resumed, resumed_history = fit(folder=folder, save_every=3)
    assert resumed.bitmask() == whole.bitmask()
    assert all(torch.equal(a, b) for a, b in zip(resumed.scores, whole.scores, strict=True))
    assert resumed_history == history
    assert not folder.exists()


def test_an_unfinished_run_is_not_continued_with_other_settings(tmp_path):
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        fit(folder=folder, save_every=3, callbacks=(Crash(),))
    with pytest.raises(ValueError, match="holds an unfinished run with other mask"):
        fit(replace(CONFIG, keep=0.5), folder=folder, save_every=3)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    model, tokenizer = load_classifier("minilm")
    rows = load_snippets()["train"].select(range(8))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds other files"):
        MFT(model).fit(tokenizer, rows, max_steps=1, folder=tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
