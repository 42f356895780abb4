"""A mask training that was stopped ends with the very mask of one that was not."""

import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from mft_nb.config import MaskConfig
from mft_nb.files import LOCK_FILE, only_process, remove_folder
from mft_nb.mask import MFT
from mft_nb.model import load_classifier
from mft_nb.study.datasets import load_snippets
from mft_nb.train import TrainConfig, fit
from tests.forks import FORKS

CONFIG = MaskConfig(init="normal", dropout=True, l1=1e-4)
TRAINING = TrainConfig(learning_rate=5e-3, batch_size=8, max_steps=12, max_grad_norm=0.0)


class Crash(TrainerCallback):
    """Stops a run after its tenth step, in the middle of its second epoch."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 10:
            raise KeyboardInterrupt


def tiny():
    """A small random model that takes MiniLM's tokens, the same in each call; and a tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes))
    return model, load_classifier("minilm")[1]


def minilm():
    """Three layers of MiniLM with their trained weights, and its tokenizer."""
    model, tokenizer = load_classifier("minilm")
    model.bert.encoder.layer = model.bert.encoder.layer[1:4]
    model.config.num_hidden_layers = 3
    return model, tokenizer


def steps(folder=None, config=CONFIG, training=TRAINING, load=tiny, callbacks=(), count=48):
    """Twelve steps of MFT, two epochs of 48 rows; with a folder, checkpoints after every third."""
    model, tokenizer = load()
    mft = MFT(model, config)
    rows = load_snippets()["train"].select(range(count))
    options = {"folder": folder, "save_every": 3 if folder else 0, "callbacks": callbacks}
    history = fit(mft, tokenizer, rows, training, eval_every=4, progress=False, **options)
    return mft, history


def same_scores(first, second):
    """Whether two MFTs have equal masks and scores."""
    pairs = zip(first.scores, second.scores, strict=True)
    return first.bitmask() == second.bitmask() and all(torch.equal(a, b) for a, b in pairs)


CONFIGS = {
    "minilm": (minilm, CONFIG),
    "tiny": (tiny, CONFIG),
    "schedule": (tiny, replace(CONFIG, keep=0.7, schedule=((0, 1.0), (11, 0.7)), scope="global")),
    "modules": (tiny, replace(CONFIG, ranking="absolute", modules_to_save=("classifier",))),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_resumed_equals_never_stopped(case, tmp_path):
    load, config = CONFIGS[case]
    whole, history = steps(None, config, load=load)
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        steps(folder, config, load=load, callbacks=(Crash(),))
    assert (folder / "checkpoint-9").exists()
    resumed, resumed_history = steps(folder, config, load=load)
    assert same_scores(resumed, whole)
    for one, other in zip(resumed.trainable, whole.trainable, strict=True):
        assert torch.equal(one, other)
    assert resumed_history == history
    assert not folder.exists()


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped after its tenth step."""
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        steps(folder, callbacks=(Crash(),))
    return folder


def test_an_unfinished_run_is_not_continued_with_other_settings(stopped):
    for change, other in (
        ({"config": replace(CONFIG, keep=0.5)}, "mask"),
        ({"training": replace(TRAINING, learning_rate=1e-3)}, "learning_rate"),
        ({"count": 40}, "rows"),
    ):
        with pytest.raises(ValueError, match=f"holds an unfinished run with other {other}"):
            steps(stopped, **change)
    assert (stopped / "checkpoint-9").exists()


@pytest.mark.parametrize("part", ["optimizer.pt", "model.safetensors"])
def test_a_checkpoint_that_was_not_written_whole_is_passed_over(stopped, part):
    whole = steps()[0]
    torn = stopped / "checkpoint-9"
    (torn / part).unlink()
    seen = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            seen.append((state.global_step, torn.exists()))

    resumed, _ = steps(stopped, callbacks=(Note(),))
    assert seen == [(0, False)]  # it was the only one, so the run began anew
    assert same_scores(resumed, whole)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds other files"):
        steps(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


class Hang(TrainerCallback):
    """Stops in the middle of writing a checkpoint, and says so."""

    def __init__(self, writing):
        self.writing = writing

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 8:
            (Path(args.output_dir) / "checkpoint-9").mkdir()
            self.writing.set()
            time.sleep(600)


def test_a_second_process_is_kept_out_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "unfinished"
    writing = FORKS.Event()
    first = FORKS.Process(target=steps, args=(folder,), kwargs={"callbacks": (Hang(writing),)})
    first.start()
    try:
        whole, _ = steps()
        assert writing.wait(timeout=240)
        with pytest.raises(RuntimeError, match="another process is training.* Wait until it ends"):
            steps(folder)
        assert (folder / "checkpoint-9").exists()
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    resumed, _ = steps(folder)
    assert same_scores(resumed, whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError, NotImplementedError])
def test_helpers_of_a_training_and_systems_without_locks_are_let_in(tmp_path, monkeypatch, error):
    with only_process(tmp_path):
        with pytest.raises(RuntimeError, match="another process is training"):
            with only_process(tmp_path):
                pytest.fail("the block must not run")
        with pytest.raises(RuntimeError, match="another process is drawing"):
            with only_process(tmp_path, "drawing"):
                pytest.fail("the block must not run")
        monkeypatch.setenv("RANK", "1")  # torchrun: one training in several processes
        with only_process(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(RuntimeError, match="another process is training"):
            with only_process(tmp_path):
                pytest.fail("the block must not run")
    with only_process(tmp_path):  # free again
        pass

    def unable(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", unable)  # a drive or a system without locks
    with only_process(tmp_path):
        pass


def test_a_lock_is_that_of_the_folder_which_is_there(tmp_path, monkeypatch):
    folder, tries = tmp_path / "unfinished", []
    acquire = filelock.FileLock.acquire

    def remove_first(lock, *arguments, **options):
        tries.append(lock)
        held = acquire(lock, *arguments, **options)
        if len(tries) == 1:  # the training before ends, and removes its folder
            remove_folder(folder)
        return held

    monkeypatch.setattr(filelock.FileLock, "acquire", remove_first)
    with only_process(folder):
        assert (folder / LOCK_FILE).exists()
        assert not tries[0].is_locked and tries[1].is_locked
        with pytest.raises(RuntimeError, match="another process is training"):
            with only_process(folder):
                pytest.fail("the block must not run")
    assert not tries[1].is_locked


def test_a_training_killed_right_after_its_start_goes_on(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / LOCK_FILE).touch()
    steps(tmp_path / "unfinished")
    assert list(tmp_path.iterdir()) == []
