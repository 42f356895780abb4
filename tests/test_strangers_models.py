"""Models that are not transformers', outputs that are not two logits, and what torch cannot do."""

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from mft_nb.mask import MFT
from mft_nb.targets import unreached_weights
from mft_nb.train import TrainConfig, fit, predict
from tests.strangers import (
    Stack,
    batch,
    bert,
    by_hand,
    config,
    logits,
    of_scores,
    same,
    state,
    steps,
    uses,
    winners,
)

INPUTS = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


class Hub(Stack, PyTorchModelHubMixin):
    """A stack with the hub's save_pretrained."""


# Models of other libraries, or of one's own


def test_the_gradient_of_a_module_that_returns_a_tensor():
    """The score of a weight gets what the masked weight gets, times the weight."""
    base, mft = Stack(), MFT(Stack(), config())
    twin = by_hand(base, of_scores(mft))
    for model in (mft.model, twin):
        model(INPUTS).sum().backward()
    for name, score in zip(mft.bitmask(), mft.scores, strict=True):
        right = twin.get_parameter(name).grad * base.get_parameter(name)
        assert torch.allclose(score.grad, right, atol=1e-7)


def test_a_model_of_the_hub_is_saved_plain_and_loads(tmp_path):
    mft = MFT(Hub(), config())
    given = mft.model(INPUTS)
    mft.save_model(tmp_path / "plain")
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) == set(Hub().state_dict())
    assert torch.equal(Hub.from_pretrained(tmp_path / "plain")(INPUTS), given)
    mft.model.save_pretrained(tmp_path / "whole")
    assert torch.equal(Hub.from_pretrained(tmp_path / "whole")(INPUTS), given)
    mft.save_pretrained(tmp_path / "mask")
    assert torch.equal(MFT.from_pretrained(Hub(), tmp_path / "mask").model(INPUTS), given)
    assert set(mft.state_dict()) > {f"layers.{n}.parametrizations.weight.0.scores" for n in "012"}
    merged = mft.merge_and_unload()
    assert torch.equal(merged(INPUTS), given)
    assert list(merged.state_dict()) == list(Hub().state_dict())


def test_a_model_without_save_pretrained_says_what_to_save():
    with pytest.raises(TypeError, match=r"Stack has no save_pretrained.*plain_state_dict\(\)"):
        MFT(Stack(), config()).save_model("nowhere")


def test_layers_that_are_used_several_times():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "embedding_size": 8}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes)).eval()
    plain = copy.deepcopy(model)
    mft = MFT(model, config())
    assert torch.equal(logits(model), logits(by_hand(plain, of_scores(mft))))
    model(**batch()).loss.backward()
    assert all(score.grad.any() for score in mft.scores)


def test_a_fast_path_that_reads_weights_without_their_module():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).eval()
    base = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left whole"):
        mft = MFT(model, config())
    plain, inputs = by_hand(base, of_scores(mft)), torch.randn(2, 5, 16)
    for grad in (torch.no_grad(), contextlib.nullcontext()):
        with grad:
            assert torch.allclose(model(inputs), plain(inputs), atol=1e-6)
    assert same(state(mft.unload()), state(base))


# Outputs that are not two logits


@pytest.fixture(scope="module")
def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def rows(label=int):
    """Sentences, with labels in some form."""
    told = [("good film", 1)] * 9 + [("bad film", 0)] * 7
    return Dataset.from_list([{"sentence": s, "label": label(one)} for s, one in told])


SHORT = TrainConfig(max_steps=3, batch_size=8, learning_rate=0.1, max_length=8)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"num_labels": 3, "problem_type": "regression"}, "num_labels is 3; allowed is 1"),
        ({"problem_type": "regression"}, "num_labels is 2; allowed is 1"),
        ({"problem_type": "multi_label_classification"}, "allowed is a list of 2 zeros and ones"),
    ],
    ids=str,
)
def test_other_outputs_are_refused_before_any_work(more, said, tokenizer):
    mft = MFT(bert(**more), config())
    settings, scores = mft.model.config.to_dict(), [s.detach().clone() for s in mft.scores]
    with pytest.raises(ValueError, match=said):
        fit(mft, tokenizer, rows(), SHORT, progress=False)
    assert mft.model.config.to_dict() == settings
    assert all(torch.equal(*pair) for pair in zip(scores, mft.scores, strict=True))
    assert predict(mft.model, tokenizer, rows()).shape == (16, mft.model.num_labels)


@pytest.mark.parametrize("label", [lambda n: n + 0.5, lambda n: n + 1, lambda n: "ab"[n]])
def test_other_labels_are_refused(label, tokenizer):
    mft = MFT(bert(), config())
    with pytest.raises(ValueError, match="has the label .*; allowed is LABEL_0, LABEL_1"):
        fit(mft, tokenizer, rows(label), SHORT, progress=False)


def test_boolean_labels_and_floats_of_pandas_are_0_and_1(tokenizer):
    first, masks = MFT(bert(), config()).bitmask(), []
    for label in (bool, float, int):
        mft = MFT(bert(), config())
        history = fit(mft, tokenizer, rows(label), SHORT, progress=False, validation=rows(label))
        guesses = predict(mft.model, tokenizer, rows(), max_length=8).argmax(1)
        right = sum(int(g) == t for g, t in zip(guesses, [1] * 9 + [0] * 7, strict=True))
        assert history.validation[-1] == [3, right / 16]
        masks.append(mft.bitmask())
    assert masks[0] == masks[1] == masks[2] != first


def test_training_and_evaluating_leave_the_config(tokenizer):
    mft = MFT(bert(), config())
    model, settings = mft.model, copy.deepcopy(mft.model.config.to_dict())
    fit(mft, tokenizer, rows(), SHORT, progress=False, validation=rows())
    predict(model, tokenizer, rows())
    assert model.config.to_dict() == settings and model.config.problem_type is None

    def fail():
        raise KeyError("measured")

    with pytest.raises(KeyError):
        fit(mft, tokenizer, rows(), SHORT, progress=False, measure=fail, eval_every=1)
    assert model.config.to_dict() == settings
    steps(mft, 1)  # transformers itself writes the kind of problem here
    assert mft.unload().config.to_dict() == settings


# Weights of the chosen layers that no mask reaches


class Mixed(nn.Module):
    """A layer of a linear weight, and of much that is none."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(8, 8)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.table = nn.Embedding(100, 8)
        self.norm = nn.LayerNorm(8)


def test_what_is_left_whole_is_counted_and_named_once():
    model = nn.Module()
    model.blocks = nn.ModuleList(Mixed() for _ in range(2))
    plain = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mft = MFT(model, config(layers=[1]))
    masked, left = 2 * 64, 3 * 64 + 2 * 4 * 64 + 3 * 64
    assert mft.bitmask().total == masked and len(said) == 1
    assert f"{left:,} of the {masked + left:,} weights" in str(said[0].message)
    assert "blocks.1.attention.in_proj_weight" in str(said[0].message)
    assert set(unreached_weights(plain, list(mft.bitmask()))) == {
        "blocks.1.attention.in_proj_weight",
        "blocks.1.recurrent.weight_ih_l0",
        "blocks.1.recurrent.weight_hh_l0",
        "blocks.1.convolution.weight",
    }


def test_fused_experts_are_named_once_or_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, **heads))
    experts = sum(p.numel() for n, p in model.named_parameters() if "layers.1.mlp" in n)
    with pytest.raises(ValueError, match="'experts'.*no weight of a linear module"):
        MFT(model, config(target_modules=("experts",)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mft = MFT(model, config(layers=[1]))
        mft.bitmask()
    assert len(said) == 1 and mft.bitmask().total == 4 * 16 * 16
    assert f"{experts:,} of the {experts + 1024:,} weights" in str(said[0].message)


def test_nothing_is_said_where_all_is_masked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (bert(), Stack(), Hub()):
            MFT(model, config())


# What torch cannot do with a parametrized module


MERGE = "merge_and_unload"


def texts(error):
    """What an error says, and those that it came from."""
    while error:
        yield str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "way",
    [
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: pickle.dumps({"served": [model]}),
        lambda model: torch.export.export(model, (INPUTS,)),
        lambda model: torch.compile(model, backend="eager", fullgraph=True)(INPUTS),
        lambda model: torch.jit.trace(model, INPUTS),
        lambda model: torch.jit.script(model),
        lambda model: torch.func.grad(gradient_of(model))(dict(scores_of(model))),
        lambda model: torch.func.vmap(copies_of(model))(stacked(model)),
    ],
    ids="save pickle export fullgraph trace script grad vmap".split(),
)
def test_what_cannot_work_says_to_merge_first(way):
    torch._dynamo.reset()  # what other tests compiled
    mft = MFT(Stack(), config())
    right = mft.model(INPUTS)
    with pytest.raises(Exception) as error:
        way(mft.model)
    assert any(MERGE in text for text in texts(error.value)), error.value
    assert torch.equal(mft.model(INPUTS), right)


def scores_of(model):
    return [(n, p.detach()) for n, p in model.named_parameters() if n.endswith("scores")]


def gradient_of(model):
    return lambda scores: torch.func.functional_call(model, scores, (INPUTS,)).sum()


def copies_of(model):
    return lambda scores: torch.func.functional_call(model, scores, (INPUTS,))


def stacked(model):
    return {name: torch.stack([score, -score]) for name, score in scores_of(model)}


def test_merged_or_loaded_it_does_work(tmp_path):
    mft = MFT(Stack(), config())
    right = mft.model(INPUTS)
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(Stack(), tmp_path).model
    for model in (loaded, mft.merge_and_unload()):
        again = pickle.loads(pickle.dumps(model))
        exported = torch.export.export(model, (INPUTS,)).module()
        traced = torch.jit.trace(model, INPUTS)
        for one in (again, exported, traced, copy.deepcopy(model)):
            assert torch.allclose(one(INPUTS), right, atol=1e-6)


def test_functional_call_takes_other_scores():
    mft = MFT(Stack(), config())
    others = {name: -score for name, score in scores_of(mft.model)}
    with torch.no_grad():
        given = torch.func.functional_call(mft.model, others, (INPUTS,))
    mask = winners(dict(zip(mft.bitmask(), others.values(), strict=True)))
    assert torch.equal(given, by_hand(Stack(), mask)(INPUTS))
    assert torch.equal(mft.model(INPUTS), by_hand(Stack(), of_scores(mft))(INPUTS))


def test_vmap_over_inputs_uses_one_mask():
    mft = MFT(Stack(), config())
    with torch.no_grad():
        given = torch.func.vmap(mft.model)(INPUTS)
    assert torch.allclose(given, by_hand(Stack(), of_scores(mft))(INPUTS), atol=1e-6)


def offload(model):
    cpu_offload(model, execution_device=torch.device("cpu"))


def to_meta(model):
    model.to("meta")


@pytest.mark.parametrize("away", [offload, to_meta])
def test_scores_that_were_put_off_say_so(away, tmp_path):
    mft = MFT(bert(), config())
    away(mft.model)
    for ask in uses(mft, tmp_path / "mask"):
        with pytest.raises(RuntimeError, match="offload.*memory|memory.*offload"):
            ask()
    assert not (tmp_path / "mask").exists()


@pytest.mark.parametrize("away", [offload, to_meta])
def test_a_mask_for_weights_that_were_put_off_is_refused(away, tmp_path):
    MFT(bert(), config()).save_pretrained(tmp_path)
    for put_on in (
        lambda model: MFT(model, config()),
        lambda model: MFT.from_pretrained(model, tmp_path),
    ):
        model = bert()
        away(model)
        with pytest.raises(ValueError, match="is not in memory .*device meta"):
            put_on(model)


def test_a_loaded_mask_may_be_put_off_and_stays_in_force(tmp_path):
    mft = MFT(bert(), config())
    right = logits(mft.model)
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(bert(), tmp_path)
    offload(loaded.model)
    assert torch.equal(logits(loaded.model), right)
