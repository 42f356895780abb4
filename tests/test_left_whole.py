"""What a mask leaves as it was: other parametrizations, earlier files, the base after a fault."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import (
    BigBirdConfig,
    BigBirdForSequenceClassification,
    FalconConfig,
    FalconForSequenceClassification,
    GPT2LMHeadModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from mft_nb.bitmask import BitMask
from mft_nb.files import remove_parts, whole, write_whole
from mft_nb.freeze import dropout_rates
from mft_nb.mask import MFT, MaskConfig
from mft_nb.mask_file import save_mask
from mft_nb.sharded import find_threshold, weights_sha256
from mft_nb.targets import maskable_weights
from tests.models import batch, copied_state, same_state, tiny_bert, tiny_gpt2_config

ALL = MaskConfig(layers="all", keep=0.5)


def small(bias=True):
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Tanh(), nn.Linear(8, 2, bias=bias))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_other_parametrizations_are_in_the_plain_state(norm):
    model = nn.Sequential(small(), norm(nn.Conv1d(2, 2, 1)))
    before = copied_state(model)
    mft = MFT(model, ALL)
    assert mft.plain_state_dict().keys() == before.keys()
    assert same_state(mft.unload(), before)


def test_a_masked_model_with_weight_norm_is_saved_whole(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolution = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (2,)}
    groups = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(
        intermediate_size=24, classifier_proj_size=8, **sizes, **convolution, **groups
    )
    model = Wav2Vec2ForSequenceClassification(config).eval()
    mft = MFT(model, ALL)
    sound = torch.randn(1, 64)
    expected = model(sound).logits
    for way, save in {"own": model.save_pretrained, "plain": mft.save_model}.items():
        save(tmp_path / way)
        loaded = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / way).eval()
        assert torch.equal(loaded(sound).logits, expected)


@pytest.mark.parametrize("name", ["0.bias", "1.in_proj_weight"])
def test_a_saved_mask_of_what_is_no_linear_weight_is_refused(name, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    before = copied_state(model)
    weights = {key: model.get_parameter(key) for key in ("0.weight", name)}
    mask = BitMask({key: torch.rand(weight.shape) > 0.5 for key, weight in weights.items()})
    path = save_mask(mask, tmp_path / "mask.safetensors", weights_sha256(weights), ALL.to_dict())
    with pytest.raises(ValueError, match="no weight of a linear module.*AppliedMask"):
        MFT.from_pretrained(model, path)
    assert same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_fault_while_a_mask_is_put_on_leaves_the_model_plain(monkeypatch):
    model, real = small(), parametrize.register_parametrization
    before = copied_state(model)

    def faulty(module, *arguments, **options):
        if module is model[2]:
            raise RuntimeError("no memory")
        return real(module, *arguments, **options)

    monkeypatch.setattr(parametrize, "register_parametrization", faulty)
    with pytest.raises(RuntimeError, match="no memory"):
        MFT(model, ALL)
    assert same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_hooks and not model._forward_pre_hooks
    monkeypatch.undo()
    MFT(model, ALL)


class OwnConv1D(Conv1D):
    """GPT-2's layer under another name."""


def own_conv():
    """One such layer, 8 inputs and 4 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(OwnConv1D(4, 8), nn.Tanh()), nn.Sequential(OwnConv1D(4, 4)))


def test_units_and_groups_of_a_subclass_of_conv1d():
    def mask_of(scope):
        config = MaskConfig(layers="all", keep=0.5, scope=scope)
        return MFT(own_conv(), config).bitmask()["0.0.weight"]

    mask = mask_of("neuron")
    assert (mask.all(0) | ~mask.any(0)).all() and (~mask).any()  # whole outputs, which are columns
    mask = mask_of("2:4")
    assert (mask.reshape(2, 4, 4).sum(1) == 2).all()  # groups along the inputs, which are rows


@pytest.mark.parametrize(("pruned", "warned"), [("outputs", True), ("inputs", False)])
def test_the_warning_of_dead_neurons_looks_along_the_outputs_of_gpt2(pruned, warned):
    model = GPT2LMHeadModel(tiny_gpt2_config())
    mft = MFT(model, MaskConfig(layers=[1], keep=0.875, target_modules=["attn.c_attn"]))
    with torch.no_grad():
        scores = mft.scores[0].fill_(1.0)
        (scores[:, :6] if pruned == "outputs" else scores[:2]).fill_(-1.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mft.merge_and_unload()
    assert any("neurons" in str(one.message) for one in told) == warned


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path):
    base = tiny_bert()
    mft = MFT(tiny_bert(), MaskConfig(layers="all", modules_to_save=["classifier"]))
    mft.save_pretrained(tmp_path)
    expected = mft.model(**batch()).logits
    with torch.no_grad():
        mft.model.classifier.weight.add_(1)
        mft.scores[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.model(**batch()).logits, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"mask.safetensors", "modules.safetensors"}


def test_a_tied_module_is_not_trained_alone():
    with pytest.raises(ValueError, match="'lm_head.weight', which is one tensor with 'transformer"):
        MFT(GPT2LMHeadModel(tiny_gpt2_config()), MaskConfig(modules_to_save=["lm_head"]))
    mft = MFT(GPT2LMHeadModel(tiny_gpt2_config()), MaskConfig(modules_to_save=["lm_head", "wte"]))
    assert len(mft.trainable) == len(mft.scores) + 1  # both names are one tensor


def test_after_merging_there_is_no_state_and_no_base():
    mft = MFT(small(), ALL)
    mft.merge_and_unload()
    for ask in (mft.state_dict, mft.base_weights, lambda: mft.load_state_dict({})):
        with pytest.raises(ValueError, match="was taken off its model"):
            ask()


def test_dropout_that_is_read_from_the_config_is_silenced_and_comes_back():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FalconConfig(hidden_dropout=0.5, attention_dropout=0.0, pad_token_id=0, **sizes)
    model = FalconForSequenceClassification(config).train()
    inputs = batch()["input_ids"] % 50
    assert any(dropout_rates(module) for module in model.modules())
    mft = MFT(model, MaskConfig(layers="all"))
    assert torch.equal(model(inputs).logits, model(inputs).logits)
    assert model.config.hidden_dropout == 0.5  # what is saved
    mft.unload()
    assert not torch.equal(model(inputs).logits, model(inputs).logits)


def test_modules_that_are_made_later_with_dropout_are_named():
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BigBirdConfig(**sizes, intermediate_size=32)
    with pytest.warns(UserWarning, match="BigBirdAttention makes anew.*rates at 0"):
        MFT(BigBirdForSequenceClassification(config))
    config.attention_probs_dropout_prob = config.hidden_dropout_prob = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BigBirdForSequenceClassification(config).train()
        MFT(model)
    inputs = batch()["input_ids"] % 99
    assert torch.equal(model(inputs).logits, model(inputs).logits)


def test_a_model_that_grew_is_given_back():
    model = small()
    mft = MFT(model, MaskConfig(layers="all", keep=0.5, l1=0.1))
    model.append(nn.Linear(2, 2))
    mft.unload()
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_called_like_a_checkpoint_gets_the_whole_model(tmp_path):
    mft = MFT(tiny_bert(), MaskConfig(layers="all"))
    for number, save in enumerate((mft.model.save_pretrained, mft.save_model), start=1):
        save(tmp_path / f"checkpoint-{number}")
        loaded = type(tiny_bert()).from_pretrained(tmp_path / f"checkpoint-{number}")
        assert torch.equal(loaded(**batch()).logits, mft.model(**batch()).logits)


def test_a_weight_without_elements_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with pytest.raises(ValueError, match="The weight '1.weight' has no elements"):
        MFT(model, MaskConfig(layers="all"))


def normed():
    """A layer of batch statistics between two linear ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_statistics_of_batch_norm_are_saved_with_the_mask_and_taken_back(tmp_path):
    mft, before = MFT(normed().train(), ALL), copied_state(normed())
    rows = torch.randn(16, 8) * 3 + 1
    mft.model(rows)
    mft.model.eval()
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(normed().eval(), tmp_path)
    assert torch.equal(loaded.model(rows), mft.model(rows))
    for one in (loaded, mft):
        assert same_state(one.unload(), before)


def test_a_head_that_was_drawn_anew_is_named_once(tmp_path):
    MFT(tiny_bert(), MaskConfig(layers="all")).save_pretrained(tmp_path)
    other = tiny_bert()
    nn.init.normal_(other.classifier.weight)
    with pytest.warns(UserWarning, match="does not cover: classifier. A head") as told:
        MFT.from_pretrained(other, tmp_path)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MFT.from_pretrained(tiny_bert(), tmp_path)


def test_what_was_changed_by_hand_is_named_and_stays():
    mft = MFT(tiny_bert(), MaskConfig(layers="all"))
    with torch.no_grad():
        mft.model.classifier.bias.add_(1)
    with pytest.warns(UserWarning, match="classifier.bias changed .* unload.. leaves such changes"):
        model = mft.unload()
    assert torch.equal(model.classifier.bias, tiny_bert().classifier.bias + 1)


def old_run(place):
    """A folder with one file in it."""
    write_whole(place / "run" / "old.txt", "old")
    return place / "run"


def replaced_by(run):
    """Replace a folder by another."""
    with whole(run) as part:
        write_whole(part / "new.txt", "new")


def holds(place):
    """All files below a folder, with what they hold."""
    found = (path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): path.read_text() for path in found}


def test_a_block_that_writes_nothing_leaves_the_old_folder(tmp_path):
    run = old_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="Nothing was written .* is as it was"):
        with whole(run):
            pass
    assert holds(tmp_path) == {"run/old.txt": "old"}


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_a_fault_between_the_two_moves_puts_the_old_folder_back(fault, tmp_path, monkeypatch):
    run, real = old_run(tmp_path), os.replace

    def faulty(source, target):
        if Path(target) == run and Path(source).parent.name.startswith(".part-"):
            raise fault("no move")
        real(source, target)

    monkeypatch.setattr(os, "replace", faulty)
    with pytest.raises(fault, match="no move"):
        replaced_by(run)
    assert holds(tmp_path) == {"run/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def killed_between_the_moves(run):
    """Replace a folder in a process that ends, without any clean-up, after the first move."""
    program = (
        "import os, sys\n"
        "from mft_nb.files import whole\n"
        "real = os.replace\n"
        "def replace(source, target):\n"
        "    real(source, target)\n"
        "    if str(source) == sys.argv[1]: os._exit(9)\n"
        "os.replace = replace\n"
        "with whole(sys.argv[1]) as part:\n"
        "    part.mkdir()\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program, str(run)], cwd=root)
    assert done.returncode == 9 and not run.exists()


@pytest.mark.parametrize("way", ["remove_parts", "next call"])
def test_a_folder_of_which_the_process_was_killed_between_the_moves_comes_back(way, tmp_path):
    run = old_run(tmp_path)
    killed_between_the_moves(run)
    if way == "remove_parts":
        remove_parts(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    else:
        with pytest.raises(FileNotFoundError, match="Nothing was written"), whole(run):
            assert (run / "old.txt").read_text() == "old"
    assert (run / "old.txt").read_text() == "old"


def test_an_old_folder_does_not_come_back_over_its_successor(tmp_path):
    run = old_run(tmp_path)
    killed_between_the_moves(run)
    write_whole(run / "third.txt", "third")
    remove_parts(tmp_path)
    assert holds(tmp_path) == {"run/third.txt": "third"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("asked", [{}, {"layers": [4]}, {"target_modules": ["query"]}])
def test_a_model_without_linear_weights_is_refused_as_such(asked):
    with pytest.raises(ValueError, match="^Sequential has no linear weights"):
        maskable_weights(nn.Sequential(nn.ReLU()), **asked)


def test_scores_that_single_precision_cannot_tell_apart_are_not_counted():
    close = 1 + torch.arange(4, dtype=torch.float64) * 1e-12
    with pytest.raises(ValueError, match="scores are float64"):
        find_threshold([close], 2)


@pytest.mark.parametrize("kept", [-1, 5])
def test_a_threshold_for_more_scores_than_there_are_is_refused(kept):
    with pytest.raises(ValueError, match=f"kept is {kept}; allowed is 0 to 4"):
        find_threshold([torch.arange(4.0)], kept)


def test_the_word_that_leaves_a_weight_whole_is_the_one_that_is_named():
    blocks = nn.ModuleList(
        nn.ModuleDict({"inside": nn.Linear(2, 2), "score": nn.Linear(2, 2)}) for _ in range(3)
    )
    model = nn.ModuleDict({"embed": blocks})  # a word before the layer's number excludes nothing
    with pytest.raises(ValueError, match="'embed.0.score.weight' is left whole by 'score'"):
        maskable_weights(model, layers="all", target_modules=["score"])
