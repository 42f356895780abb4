"""A mask training that was cut off ends with the very mask of one that was not."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from mft_nb import train as training
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
    assert len(list(tmp_path.iterdir())) == 1


def fit_tiny(folder, *callbacks):
    """Twelve steps of MFT on a small random model, with checkpoints."""
    _, tokenizer = load_classifier("minilm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    mft = MFT(BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes)), CONFIG)
    rows = load_snippets()["train"].select(range(48))
    options = {"max_steps": 12, "save_every": 3, "progress": False, "callbacks": callbacks}
    mft.fit(tokenizer, rows, folder=folder, **options)
    return mft


class Hang(TrainerCallback):
    """Stops in the middle of writing a checkpoint."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 8:
            (Path(args.output_dir) / "checkpoint-9").mkdir()
            print("writing", flush=True)
            time.sleep(600)


def test_a_second_process_is_kept_out_until_the_first_is_killed(tmp_path):
    whole, folder = fit_tiny(None), tmp_path / "unfinished"
    code = f"from tests.test_resume import *; fit_tiny({str(folder)!r}, Hang())"
    here = Path(__file__).resolve().parent.parent
    first = subprocess.Popen(
        [sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(RuntimeError, match="another process is training.* Wait until it ends"):
            fit_tiny(folder)
        assert (folder / "checkpoint-9").exists()
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    resumed = fit_tiny(folder)
    assert resumed.bitmask() == whole.bitmask()
    assert all(torch.equal(a, b) for a, b in zip(resumed.scores, whole.scores, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_the_helpers_of_a_training_and_systems_without_locks_are_let_in(tmp_path, monkeypatch):
    def busy(*_):
        raise BlockingIOError

    def unable(*_):
        raise OSError

    monkeypatch.setattr(training.fcntl, "flock", busy)
    with pytest.raises(RuntimeError, match="another process is training"):
        training._lock(tmp_path)
    monkeypatch.setenv("RANK", "1")  # torchrun: one training in several processes
    with training._lock(tmp_path) as lock:
        assert lock is None
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(training.fcntl, "flock", unable)
    training._lock(tmp_path).close()
    monkeypatch.setattr(training, "fcntl", None)  # Windows
    with training._lock(tmp_path) as lock:
        assert lock is None


def test_a_lock_is_that_of_the_folder_which_is_there(tmp_path, monkeypatch):
    folder, tries = tmp_path / "unfinished", []

    def flock(file, how):
        tries.append(file)
        if len(tries) == 1:  # the training before ends, and takes its folder along
            training.remove_folder(folder)

    monkeypatch.setattr(training.fcntl, "flock", flock)
    with training._lock(folder) as lock:
        assert lock is tries[1] and tries[0].closed
        assert (folder / ".lock").exists()


def test_a_training_killed_right_after_its_start_goes_on(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / ".lock").touch()
    fit_tiny(tmp_path / "unfinished")
    assert list(tmp_path.iterdir()) == []
