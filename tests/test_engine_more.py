"""The engine where several things meet: penalties and accumulation, heads, wrappers, warnings."""

import pickle
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mft_nb.bitmask import BitMask, load_mask, mask_sha256
from mft_nb.mask import MASK_FILE, MFT, MaskConfig
from tests.test_engine import batch, tiny_bert


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **heads))


def tiny_bart(**sizes):
    torch.manual_seed(0)
    widths = {"d_model": 24, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_labels": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2} | sizes
    config = BartConfig(vocab_size=50, max_position_embeddings=32, **widths, **layers, **heads)
    return BartForSequenceClassification(config)


class Gradients(TrainerCallback):
    """Keeps the scores' gradient as the optimizer gets it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_the_penalty_counts_once_a_step_however_the_step_is_split(make, tmp_path):
    language = make is tiny_llama
    rows = [
        {"input_ids": [5, 6, 7, 8 + row], "labels": [5, 6, 7, 8] if language else row % 2}
        for row in range(8)
    ]
    pulls = []
    for l1, parts in ((0.0, 1), (0.0, 4), (0.5, 1), (0.5, 4)):
        mft = MFT(make(), MaskConfig(layers="all", l1=l1))
        seen = Gradients()
        options = {"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": []}
        options |= {"per_device_train_batch_size": 8 // parts, "use_cpu": True}
        options |= {"gradient_accumulation_steps": parts, "disable_tqdm": True}
        arguments = TrainingArguments(tmp_path, **options)
        data = Dataset.from_list(rows)
        Trainer(mft.model, arguments, train_dataset=data, callbacks=[seen]).train()
        pulls.append((l1, parts, seen.found))
    task = {parts: found for l1, parts, found in pulls if not l1}
    for l1, parts, found in pulls:
        if l1:
            assert torch.allclose((found - task[parts]).abs(), torch.tensor(l1), atol=1e-5)


def test_a_loss_in_a_plain_dict_gets_its_penalty():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return {"loss": x.sum() * 0.0}

    model = Wrapped()
    mft = MFT(model, MaskConfig(layers="all", l1=0.1))
    model.train()
    assert model(torch.ones(1, 4))["loss"].item() == pytest.approx(mft.penalty().item())
    model.eval()
    assert model(torch.ones(1, 4))["loss"].item() == 0.0


def test_head_scope_stays_inside_the_layers_and_takes_each_stack_by_its_own_heads():
    model = tiny_bart(decoder_attention_heads=4)
    mft = MFT(model, MaskConfig(layers="all", scope="head", keep=0.5))
    names = list(mft.base_weights())
    assert names and all(".layers." in name for name in names)
    for name, masked in mft._masked.items():
        assert masked.scores.numel() == (4 if "decoder" in name else 2), name


@pytest.mark.parametrize("scope", ["2:4", "head", "neuron"])
def test_scopes_on_conv1d_count_along_the_inputs(scope):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes))
    mft = MFT(model, MaskConfig(layers="all", scope=scope, keep=0.5))
    for name, mask in mft.bitmask().items():  # (in, out)
        if scope == "2:4":
            assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) == 2).all(), name
        elif scope == "head":
            assert (mask.all(1) | ~mask.any(1)).all(), name
            assert mask[:8].any() != mask[8:].any(), name
        else:
            assert (mask.all(0) | ~mask.any(0)).all(), name


def test_layers_are_found_inside_an_outer_sequential():
    plain = MFT(tiny_bert(), MaskConfig(layers="all", scope="layer", keep=0.5)).bitmask()
    inside = nn.Sequential(tiny_bert(), nn.Identity())
    wrapped = MFT(inside, MaskConfig(layers="all", scope="layer", keep=0.5)).bitmask()
    assert wrapped == BitMask({f"0.{name}": mask for name, mask in plain.items()})
    assert wrapped.density_by_layer() == plain.density_by_layer()
    assert len(plain.density_by_layer()) == 3


def test_two_stacks_are_two_groups_of_layers():
    mask = MFT(tiny_bart(), MaskConfig(layers="all", keep=0.5)).bitmask()
    layers = mask.density_by_layer()
    assert len(layers) == 4 and all(isinstance(name, str) for name in layers)


def test_equal_masks_are_equal_in_any_order():
    first = BitMask({"a": torch.tensor([True, False]), "b": torch.tensor([True])})
    second = BitMask({"b": torch.tensor([True]), "a": torch.tensor([True, False])})
    assert first == second and mask_sha256(first) == mask_sha256(second)
    assert first & second == second & first
    assert first != BitMask({"a": torch.tensor([True, False])})


def test_nan_is_named_in_scores_and_weights():
    mft = MFT(tiny_bert(), MaskConfig(layers="all", scope="global"))
    names = list(mft.base_weights())
    with torch.no_grad():
        mft.scores[7][0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"The scores of {names[7]}: 1 of .* scores are NaN"):
        mft.model(**batch())
    model = tiny_bert()
    with torch.no_grad():
        model.get_parameter(names[3])[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"The weight '{names[3]}' holds NaN"):
        MFT(model, MaskConfig(layers="all"))


@pytest.mark.parametrize("scope", ["tensor", "neuron"])
def test_a_matrix_that_is_cut_whole_is_allowed_and_warned_of(scope):
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    config = MaskConfig(layers="all", scope=scope, keep=0.2, exclude_modules=())
    mft = MFT(model, config)
    with torch.no_grad():
        for scores in mft.scores:
            scores.fill_(-1.0)
    for masked in mft._masked.values():
        masked.group.keep = 1e-9  # nothing is left
    with pytest.warns(UserWarning, match="The mask cuts all of 0.weight"):
        model = mft.merge_and_unload()
    assert not model[0].weight.any()


def test_save_pretrained_takes_its_arguments_by_place(tmp_path):
    mft = MFT(tiny_bert(), MaskConfig(layers="all"))
    mft.model.save_pretrained(tmp_path / "plain", True)
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_a_pickle_is_no_mask_file_and_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for write in (lambda p: p.write_bytes(pickle.dumps(Trap())), lambda p: torch.save(Trap(), p)):
        write(tmp_path / MASK_FILE)
        with pytest.raises(ValueError, match="is no mask file|is damaged|not a mask file"):
            load_mask(tmp_path / MASK_FILE)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's default compiler needs g++")
def test_a_mask_under_the_default_compiler():
    torch._dynamo.reset()
    mft = MFT(tiny_bert(), MaskConfig(layers=(1,)))
    compiled = torch.compile(mft.model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        first = compiled(**batch()).logits
        assert torch.allclose(first, mft.model(**batch()).logits, atol=1e-5)
        mft.scores[0].neg_()
        assert torch.allclose(compiled(**batch()).logits, mft.model(**batch()).logits, atol=1e-5)
