"""Two processes under FSDP: on both the very mask of one process, or a refusal in words."""


import pytest
import torch

from mft_nb.bitmask import BitMask
from mft_nb.mask import MFT
from tests.forks import FORKS
from tests.fsdp_processes import SCHEDULE, SCOPES, run_trials, settings
from tests.strangers import bert, config, steps

FEW = 0.002  # share of bits that another order of summing gradients may change


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("fsdp")
    both = [FORKS.Process(target=run_trials, args=(folder, rank)) for rank in (0, 1)]
    try:
        for process in both:
            process.start()
        for process in both:
            process.join(timeout=240)
    finally:
        for process in both:
            process.kill()
    assert [process.exitcode for process in both] == [0, 0]  # stderr says why
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


def alone(settings, **how):
    """One process with the same batch."""
    mft = MFT(bert(), settings)
    first = mft.bitmask()
    steps(mft, **how)
    assert (mft.bitmask() ^ first).kept > 0.02 * first.total, "too little moved to test anything"
    return mft.bitmask()


@pytest.mark.parametrize("scope", SCOPES)
def test_both_processes_have_the_mask_of_one(scope, found):
    right = alone(settings(scope))
    for rank in found:
        assert not isinstance(rank[scope], str), rank[scope]
        mask, loaded, off = rank[scope]
        assert (BitMask(mask) ^ right).kept <= FEW * right.total
        assert BitMask(mask).kept == right.kept  # exactly as many
        assert BitMask(loaded) == BitMask(mask) == BitMask(found[0][scope][0])
        assert off < 1e-5


def test_a_head_trained_along_is_in_the_file(found):
    for rank in found:
        off, moved = rank["head"]
        assert off < 1e-5 < moved


def test_a_schedule_keeps_the_same_or_is_refused(found):
    mft, right = MFT(bert(), config(**SCHEDULE)), []
    for _ in range(4):
        right.append(round(mft.bitmask().density, 3))
        steps(mft, 1)
    right.append(round(mft.bitmask().density, 3))
    assert right == [1, 0.833, 0.667, 0.5, 0.5]
    for rank in found:
        if isinstance(rank["schedule"], str):
            assert refusal(rank["schedule"], "schedule", "FSDP")
        else:
            assert rank["schedule"] == right


def test_a_penalty_is_refused(found):
    for rank in found:
        assert refusal(rank["penalty"], "penalty", "l1=0")


def test_a_mask_is_not_taken_off_a_sharded_model(found):
    for rank in found:
        for way in ("unload", "merge"):
            assert refusal(rank[way], "sharded by FSDP", "save_pretrained")
        assert abs(rank["after"] - 0.8) < 0.01  # it is still there


def test_a_model_that_was_sharded_first_is_refused_by_name(found):
    for rank in found:
        assert rank["first"] == "taken" or refusal(rank["first"], "sharded", "weight")


def test_the_older_fsdp_shows_its_mask_where_scores_are_whole(found):
    right = alone(settings("tensor"))
    for rank in found:
        assert not isinstance(rank["older"], str), rank["older"]
        mask, outside, save = rank["older"]
        assert (BitMask(mask) ^ right).kept <= FEW * right.total
        assert refusal(outside, "FullyShardedDataParallel", "summon_full_params")
        assert refusal(save, "FullyShardedDataParallel", "summon_full_params")


@pytest.mark.parametrize("init", ["ones", "normal"])
def test_pieces_of_unequal_size_and_equal_scores(init, found):
    right = MFT(bert(intermediate_size=25), config(init=init, scope="global")).bitmask()
    for rank in found:
        assert BitMask(rank["uneven"][init]) == right
    if init == "ones":  # the first ones of all are kept
        flat = torch.cat([mask.flatten() for mask in right.values()])
        assert flat[: right.kept].all() and not flat[right.kept :].any()


def test_a_score_without_a_value_stops_all_processes(found):
    for rank in found:
        assert refusal(rank["spoilt"], "NaN", "bert.encoder.layer.0.attention.self.query.weight")


def test_rounded_scores_give_no_other_mask_in_silence(found):
    for rank in found:
        assert rank["rounded"] == 0 or refusal(rank["rounded"], "bfloat16", "precision")


def test_finished_masks_and_plain_models_are_refused_in_pieces(found):
    for rank in found:
        for way in ("applied", "switch"):
            assert refusal(rank[way], "'bert.encoder.layer.0", "sharded"), rank[way]
        assert refusal(rank["save_model"], "sharded by FSDP", "save_pretrained"), rank["save_model"]


def refusal(text, *words):
    """Whether a text is an error of ours that says these words."""
    kinds = ("ValueError: ", "RuntimeError: ")
    return isinstance(text, str) and text.startswith(kinds) and all(w in text for w in words)
