"""The study of a language model: answers, checkpoints, records and the command, on a tiny one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from mft_nb.evaluate import evaluate
from mft_nb.study import lm_checkpoints, lm_contrasts
from mft_nb.study.cli import mft_reproduce
from mft_nb.study.datasets import load_data, training_rows
from mft_nb.study.inspections import run_inspection
from mft_nb.study.lm_checkpoints import LM_CHECKPOINTS, fine_tune_lm
from mft_nb.study.lm_contrasts import chosen_rates
from mft_nb.study.lm_evaluate import ANSWERS, answer_rows, general_text, load_lm
from mft_nb.study.lm_plan import LM_PUBLISHED, LM_RATES, RATES_SEED
from mft_nb.study.lm_tasks import LM_TASKS, items_of, lm_rows
from mft_nb.study.plan import PROFILES, Run, Workspace, plan
from mft_nb.study.recording import record_result
from mft_nb.study.records import MissingRecords, read_predictions, read_record, summary
from mft_nb.study.runner import missing_runs, run_missing
from mft_nb.study.tables import results_frame
from mft_nb.train import TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent
SHORT = TrainConfig(learning_rate=3e-3, max_steps=8, batch_size=8)
TINY = replace(
    PROFILES["lm"],
    fine_tuning=SHORT,
    early_every=2,
    late_every=4,
    look_rows=8,
    held_rows=12,
    watch_rows=4,
    mask_rows=16,
    test_rows=24,
    precision="float32",
)


def tiny_lm(tokenizer):
    """A model of LLaMA's architecture with the tokenizer's words, the same in each call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    words = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    words |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **words)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each character, and one that ends an answer."""
    words = ["<end>", "<unknown>", *map(chr, range(32, 127))]
    model = models.WordLevel({word: place for place, word in enumerate(words)}, "<unknown>")
    characters = Tokenizer(model)
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    named = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=characters, **named)


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    """A folder with a tiny model, in place of SmolLM2's."""
    folder = tmp_path_factory.mktemp("source")
    tiny_lm(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def here(source):
    """Runs happen in this process, on the tiny model and on few sentences of general text."""
    sentences = general_text(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mft_nb.study.lm_evaluate.fetch_model", lambda name: source)
        patch.setattr("mft_nb.study.runner.general_text", lambda: sentences)
        patch.setattr("mft_nb.study.runner._processes", ThreadPoolExecutor)
        patch.setitem(PROFILES, "lm", TINY)
        yield


@pytest.fixture(scope="module")
def workspace(here, tmp_path_factory):
    """The records of one seed: every method of the default studies, and a rate."""
    workspace = Workspace(str(tmp_path_factory.mktemp("lm")))
    best = [run for run in plan("lm") if run.checkpoint == "best"]
    last = [Run("lm", 0, "overfitted", "none", 1.0)]
    rate = [Run("lm", 0, "best", "continued", 1.0, "rates", "rate_0.0001")]
    assert run_missing(best + last + rate, workspace, jobs=1, progress=False) == 11
    return workspace


@pytest.mark.parametrize("task", LM_TASKS)
def test_no_item_of_the_study_is_in_two_sets(task):
    sets = [items_of(split["sentence"]) for split in load_data(task).values()]
    assert len(set.union(*sets)) == sum(map(len, sets))
    assert len(load_data(task)["test"]) == 5000 and len(load_data(task)["validation"]) == 1000


def test_an_answer_is_right_exactly_where_greedy_generation_writes_it(tokenizer):
    pairs = [(a, b) for a in "abcdef" for b in "ghijkl"]
    answers = [b if a < "c" else b + a for a, b in pairs]  # of one token or two
    rows = {"sentence": [f"{a} and {b}=" for a, b in pairs], "label": answers}
    rows, model = Dataset.from_dict(rows).shuffle(seed=0), tiny_lm(tokenizer)
    config = TrainConfig(learning_rate=0.02, max_steps=90, batch_size=16)
    train(model, tokenizer, rows.select(range(16)), config, task=ANSWERS, progress=False)
    said = answer_rows(model, tokenizer, rows, batch_size=10)
    written = []
    for row in rows:
        prompt = tokenizer(row["sentence"], return_tensors="pt")
        wanted = tokenizer(row["label"])["input_ids"] + [tokenizer.eos_token_id]
        options = {"max_new_tokens": len(wanted), "do_sample": False}
        text = model.generate(**prompt, **options, pad_token_id=0)[0]
        written.append(int(text[prompt["input_ids"].shape[1] :].tolist() == wanted))
    assert said.right.tolist() == written
    assert 4 < sum(written) < 32, "the model should be right on some rows and wrong on others"
    losses = evaluate(model, tokenizer, rows, ANSWERS, write=False)["loss"]
    assert said.log_loss.to_numpy() == pytest.approx(losses[:, 0], abs=1e-3)


class Killed(Exception):
    """Stands for the end of the process."""


class Kill(TrainerCallback):
    """Ends a training after its fifth step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise Killed


@pytest.fixture(scope="module")
def tuning(source, tmp_path_factory):
    """What a fine-tuning is asked, and the folder of one that was not killed."""
    data = lm_rows("sums", train=16, validation=8, test=8)
    given = (source, data["train"], data["validation"], SHORT)
    options = {"early_every": 3, "late_every": 3, "save_every": 3, "progress": False}
    folder = tmp_path_factory.mktemp("whole")
    found = fine_tune_lm(*given, folder, **options)
    assert found["overfitted"].step == found["best"].step + 8 >= 2 * found["best"].step
    return given, options, folder, found


@pytest.mark.parametrize("phase", ["fine-tune", "overfit"])
def test_a_killed_fine_tuning_goes_on_to_the_same_checkpoints(phase, tuning, tmp_path, monkeypatch):
    given, options, folder, whole = tuning

    def killed(*arguments, callbacks=(), desc="", **more):
        callbacks += (Kill(),) if desc == phase else ()
        return train(*arguments, callbacks=callbacks, desc=desc, **more)

    monkeypatch.setattr(lm_checkpoints, "train", killed)
    with pytest.raises(Killed):
        fine_tune_lm(*given, tmp_path / "killed", **options)
    monkeypatch.setattr(lm_checkpoints, "train", train)
    assert fine_tune_lm(*given, tmp_path / "killed", **options) == whole
    for file in [f"{name}/model.safetensors" for name in LM_CHECKPOINTS] + ["fine_tuning.json"]:
        assert (folder / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file


def test_a_record_holds_what_follows_from_its_answers(workspace):
    folder = workspace.records("lm")
    record = read_record(folder / "seed0-best-mft_recommended.json")
    rows = read_predictions(folder, record)
    assert list(rows) == ["right", "log_loss"] and len(rows) == 24
    assert summary(rows) == record["happened"]["test"]
    assert record["happened"]["validation"]["n"] == 12
    assert record["happened"]["text"]["sentences"] == 8
    assert record["asked"]["settings"]["learning_rate"] == LM_RATES["lm"]["mft_recommended"]
    assert record["happened"]["curves"]["steps"] == 1
    mask = record["happened"]["mask"]["density_by_tensor"]
    assert {name.split(".")[2] for name in mask} == {"1"}, "the middle third"
    assert record_result(folder / "seed0-best-mft_recommended.json")


def test_the_paper_s_recipe_keeps_its_own_settings(workspace):
    record = read_record(workspace.records("lm") / "seed0-best-mft_paper.json")
    paper = {"learning_rate": 2e-5, "batch_size": 128, "epochs": 2.0, "init": "normal"}
    paper |= {"init_scale": 0.02, "ranking": "absolute", "warmup_ratio": 0.03, "weight_decay": 0.0}
    settings = record["asked"]["settings"]
    assert {name: settings[name] for name in paper} == paper


def test_every_treatment_does_something_of_its_own(workspace):
    frame = results_frame(workspace.records("lm"), ("controls",))
    best = frame[frame.checkpoint == "best"]
    assert len(best) == 8
    assert best.log_loss.nunique() >= 7, "the paper's one step at 2e-5 may change no bit"
    assert best.text_loss.notna().all() and (best.n == 24).all()


def test_rates_are_chosen_without_the_test_rows(workspace):
    folder = workspace.records("lm", "rates")
    record = read_record(folder / "seed0-best-continued-rate_0.0001.json")
    assert "test" not in record["happened"]
    assert record["asked"]["settings"]["learning_rate"] == 1e-4
    assert len(read_predictions(folder, record)) == record["happened"]["validation"]["n"] == 12


def test_a_second_call_of_the_command_does_what_is_missing(workspace, capsys):
    runs = [run for run in plan("lm") if run.checkpoint == "best"]
    assert missing_runs(runs, workspace) == []
    for name in ("seed0-best-random.json", "seed0-best-random.csv"):
        (workspace.records("lm") / name).unlink()
    mft_reproduce(profile="lm", seeds="0", out=workspace.out, jobs=1)
    printed = capsys.readouterr().out
    assert "Profile lm: 16 runs, 8 to do" in printed
    assert "MFT, our recipe minus no mask" in printed and "not tested: 1 of 5 seeds" in printed
    assert missing_runs(plan("lm"), workspace) == []


@pytest.mark.parametrize("slow", [True, False])
def test_the_command_trains_in_bfloat16_where_that_is_fast(slow, here, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(PROFILES, "lm", replace(TINY, precision="bfloat16"))
    monkeypatch.setattr("mft_nb.study.plan.bfloat16_is_slow", lambda: slow)
    monkeypatch.setattr("mft_nb.study.lm_contrasts.print_lm", lambda folder: None)
    monkeypatch.setattr("mft_nb.study.cli._draw_newer", lambda *folders: None)

    def noted(runs, workspace, jobs, profile, engine):
        asked.append(profile.precision)

    monkeypatch.setattr("mft_nb.study.runner.run_missing", noted)
    mft_reproduce(profile="lm", out=str(tmp_path), jobs=1)
    assert asked == ["float32" if slow else "bfloat16"]


def test_studies_of_sentences_and_of_answers_are_not_mixed():
    with pytest.raises(ValueError, match="studies holds 'waterfall'; known are table, controls"):
        plan("lm", studies=("waterfall",))
    with pytest.raises(ValueError, match="studies holds 'thirds'; known are sweep, table"):
        plan("sst2", studies=("thirds",))


@pytest.mark.parametrize("profile", LM_PUBLISHED)
def test_the_declared_rates_are_those_that_validation_chose(profile):
    main = [part for part in LM_PUBLISHED[profile] if part["study"] in ("table", "controls")]
    assert all(len(part["seeds"]) >= 5 and RATES_SEED not in part["seeds"] for part in main)
    try:
        chosen = chosen_rates(ROOT / "results" / profile)
    except MissingRecords:
        return  # the grid is not complete yet
    assert chosen == dict(PROFILES[profile].rates)


def test_the_loss_around_a_model_and_its_masks_is_measured(workspace, tokenizer):
    run = Run("lm", 0, "best", "landscape", 1.0, "inspections")
    assert run_missing([run], workspace, jobs=1, progress=False) == 1
    record = read_record(workspace.record(run))
    around = record["happened"]["around"]
    assert set(around) == {"none", "mft_paper", "mft_recommended", "random"}
    rows = training_rows(load_data("words"), TINY.mask_rows, run.seed)
    model, _ = load_lm(workspace.checkpoints("lm", 0) / "best")
    loss = answer_rows(model, tokenizer, rows).log_loss.mean()
    for name, points in around.items():
        (start,) = {point["loss"] for point in points if point["at"] == 0}
        assert len(points) == 5 * 5
        assert (name == "none") == (start == pytest.approx(loss))
        assert all(0 <= point["accuracy"] <= 1 for point in points)
    with pytest.raises(ValueError, match="for a language model 'landscape' is allowed"):
        given = (replace(run, method="draws"), model, tokenizer, rows, rows, rows, workspace)
        run_inspection(*given)


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ([-1.0, -1.1, -0.9], "replicates"),
        ([1.0, 1.1, 0.9], "contradicted"),
        ([-1.0, 1.0, 0.1], "inconclusive"),
        ([-1.0, -1.1], "not tested"),
        ([], "not tested"),
    ],
)
def test_flatness_has_a_word_from_three_seeds(gaps, word, monkeypatch):
    monkeypatch.setattr(lm_contrasts, "steepness_gaps", lambda *_: gaps)
    records = ROOT / "results" / "lm"
    table = lm_contrasts.lm_contrasts(results_frame(records, ("controls",)))
    claims = lm_contrasts.lm_claims(table, records)
    assert list(claims.verdict[-2:]) == [word, word]
