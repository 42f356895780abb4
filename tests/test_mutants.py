"""Small promises that no other test asks about: each is broken by a change of one expression."""

import sys
import warnings

import pytest
import torch
from torch import nn

from mft_nb.applied import AppliedMask
from mft_nb.bitmask import BitMask, fully_pruned, overlap, random_mask
from mft_nb.fraction import check_schedule
from mft_nb.mask import MFT
from mft_nb.mask_file import load_mask, save_mask
from mft_nb.scopes import head_units
from mft_nb.scores import ScoreGroup, initial_scores
from mft_nb.targets import WeightInfo
from mft_nb.topk import TopK, top_k
from tests.strangers import Stack, bert, config


@pytest.fixture
def no_warning():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(*shape, seed=0):
    """Numbers from a normal distribution, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape):
    """A mask that keeps all."""
    return torch.ones(shape, dtype=torch.bool)


def step(mft, optimizer):
    """One step on the sum of what a stack returns."""
    mft.model(drawn(4, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_is_trained_with_the_scores_is_counted_apart(capsys):
    model = bert()
    plain = sum(parameter.numel() for parameter in model.parameters())
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    mft = MFT(model, config(modules_to_save=("classifier",)))
    scores = sum(score.numel() for score in mft.scores)
    mft.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable scores: {scores:,}, {head:,} weights trained with them, on a model of "
        f"{plain:,} weights\n"
    )


def test_a_schedule_that_came_to_its_end_is_saved_without_a_warning(tmp_path, no_warning):
    mft = MFT(Stack(), config(schedule=((0, 1.0), (2, 0.8))))
    optimizer = torch.optim.SGD(mft.trainable, 1.0)
    step(mft, optimizer)
    with pytest.warns(UserWarning, match="ends at step 2"):
        mft.save_pretrained(tmp_path)
    step(mft, optimizer)
    mft.save_pretrained(tmp_path)


def test_whole_neurons_pruned_on_purpose_are_no_warning(tmp_path, no_warning):
    MFT(Stack(), config(scope="neuron", keep=0.5)).save_pretrained(tmp_path)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mask_alone_is_one_file_whatever_the_rank(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    path = MFT(Stack(), config()).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_whose_loaded_mask_was_merged_takes_another(tmp_path):
    MFT(Stack(), config()).save_pretrained(tmp_path)
    model = Stack()
    loaded = MFT.from_pretrained(model, tmp_path)
    assert loaded.merge_and_unload() is model
    mft = MFT(model, config(keep=0.5))
    assert mft.bitmask().density == 0.5


def test_a_group_refuses_a_fraction_that_its_scope_does_not_keep():
    with pytest.raises(ValueError, match="Give keep=0.5"):
        ScoreGroup(0.9, "2:4")


def test_a_group_counts_each_backward_pass_once():
    mft = MFT(Stack(), config(scope="global"))
    group = mft.model.layers[0].parametrizations.weight[0].group
    seen = []
    group.on_gradient = lambda: seen.append(group.gradients)
    mft.model(drawn(4, 8)).sum().backward()
    assert seen == [1, 2, 3]  # one for each of its three weights


def test_a_mask_follows_its_scores_before_any_forward_pass():
    mft = MFT(Stack(), config())
    before = mft.bitmask()
    with torch.no_grad():
        for score in mft.scores:
            score.neg_()
    assert (mft.bitmask() & before).density < 0.7  # at most 0.6 but for rounding


@pytest.mark.parametrize("init", ["normal", "ones"])
def test_scores_are_made_where_the_weight_is(init):
    scores = initial_scores(torch.ones(2, 3, device="meta"), init, 1.0, torch.Generator())
    assert scores.is_meta and scores.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_top_k_of_scores_that_move_is_exact_in_any_dtype(dtype):
    finder, scores = TopK(), [drawn(40, 30).to(dtype), drawn(17, seed=1).to(dtype)]
    for call in range(6):
        masks = finder(scores, 900)
        exact = top_k(torch.cat([score.reshape(-1) for score in scores]), 900)
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), exact), call
        scores = [score + 0.01 * drawn(*score.shape, seed=call).to(dtype) for score in scores]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("decimals", [0, 1, 6])  # with many ties, some, none
def test_the_masked_weight_is_the_weight_where_the_mask_is(dtype, turned, decimals):
    finder, weight = TopK(), drawn(30, 40, seed=1).to(dtype)
    weight[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    weight = weight.T.contiguous().T if turned else weight
    for kept in (0, 1, 700, 701, 1199, 1200):
        scores = drawn(30, 40, seed=kept).round(decimals=decimals)
        scores[1, :2] = torch.tensor([torch.inf, -torch.inf])
        for _ in range(2):  # searched, then proved or found in the band
            found = finder.winners([scores], kept)
            right = torch.where(top_k(scores, kept), weight, 0)
            given = found.masked(weight, scores)
            assert torch.equal(found.mask(scores), top_k(scores, kept))
            assert given.dtype == dtype and torch.equal(given.nan_to_num(7), right.nan_to_num(7))


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_scores_that_are_no_numbers_are_refused_whatever_is_kept(kept):
    scores = torch.arange(8.0)
    finder = TopK()
    finder([scores], kept)
    scores[2] = torch.nan
    for find in (lambda: finder([scores], kept), lambda: top_k(scores, kept)):
        with pytest.raises(ValueError, match="1 of 8 scores are NaN"):
            find()


def test_scores_that_drift_are_searched_once():
    finder, scores, drift = TopK(), drawn(200_000), drawn(200_000, seed=1)
    for _ in range(40):
        finder([scores], 160_000)
        scores = scores + 1e-4 * drift
    assert finder.searches == 1 and finder.calls == 40


def test_an_attention_with_one_head_is_one_unit():
    units = head_units(WeightInfo("w", (4, 6), heads=1))
    assert units.collect(torch.ones(4, 6)).tolist() == [[[24.0]]]


def test_a_schedule_with_a_fraction_above_1_is_refused():
    with pytest.raises(ValueError, match="keep is 1.5"):
        check_schedule([(0, 1.5), (10, 0.8)], 0.8)


def test_a_mask_says_how_much_it_prunes():
    mask = BitMask({"w": torch.arange(1000).view(20, 50) >= 250})
    assert repr(mask) == "BitMask(1 tensors, 250 of 1,000 weights pruned, density 0.7500)"


def test_a_mask_of_one_dimension_counts_as_one_neuron():
    assert fully_pruned(BitMask({"kept": ones(5), "gone": ~ones(5)})) == {"gone": 1}


def test_overlap_at_its_ends():
    nothing = BitMask({"w": ones(2, 2)})
    assert overlap(nothing, nothing).jaccard == 1
    single = overlap(BitMask({"w": ~ones(1)}), BitMask({"w": ~ones(1)}))
    assert (single.fraction, single.chance, single.jaccard) == (1, 1, 1)


def test_three_masks_on_one_weight_are_undone_from_the_last():
    model, applied = nn.Linear(6, 6), []
    states = [model.weight.detach().clone()]
    for seed in range(3):
        mask = random_mask({"weight": model.weight}, 0.7, seed=seed)
        applied.append(AppliedMask(model, mask))
        states.append(model.weight.detach().clone())
    for one in applied[:2]:
        with pytest.raises(ValueError, match="A later mask"):
            one.undo()
    for number in (2, 1, 0):
        applied[number].undo()
        assert torch.equal(model.weight, states[number])
    assert torch.equal(applied[0].base_weights()["weight"], states[0])


def test_a_picture_tells_what_it_shows():
    mask = BitMask({f"w{i}": torch.arange(60).view(6, 10) >= 15 for i in range(3)})
    figure = mask.picture(2)
    axes, bar = figure.axes
    assert axes.get_title() == "45 of 180 weights pruned, 2 of 3 matrices shown"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["w0  0.750", "w1  0.750"]
    assert axes.get_yticks().tolist() == [2.5, 9.5]  # each strip has 6 rows, and a gap of 1
    assert (axes.get_xlabel(), bar.get_ylabel()) == ("inputs", "fraction kept")
    assert mask.picture(1).axes[0].get_title().endswith("1 of 3 matrices shown")
    assert mask.picture(3).axes[0].get_title() == "45 of 180 weights pruned"


@pytest.mark.parametrize("most", [0, -1, 2.5, True])
def test_a_picture_of_no_whole_number_of_matrices_is_refused(most):
    with pytest.raises(ValueError, match="allowed is a whole number from 1"):
        BitMask({"w": ones(2, 2)}).picture(most)


def test_a_picture_without_matplotlib_names_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"in a clone of mft_nb, pip install '\.\[study\]'"):
        BitMask({"w": ones(2, 2)}).picture()


def test_a_matrix_without_weights_is_saved_and_loaded(tmp_path):
    mask = BitMask({"empty": ones(0, 3), "w": ones(2, 2)})
    path = save_mask(mask, tmp_path / "mask", "0" * 64)
    assert load_mask(path).mask == mask
