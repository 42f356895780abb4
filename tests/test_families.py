"""The engine on many families of models, each tiny and drawn at random, without a hub."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

from mft_nb.mask import MFT, MaskConfig
from mft_nb.targets import find_layers, layer_count, maskable_weights

SIZES = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GROUPED = TEXT | {"num_key_value_heads": 1}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 2, "max_position_embeddings": 40}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 40}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 4, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
VIT = {key: value for key, value in TEXT.items() if key.endswith(("size", "layers", "heads"))}
VIT |= {"image_size": 8, "patch_size": 4}
DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"share_att_key": True}
MODERN = {"cls_token_id": 1, "sep_token_id": 2}

CLASSIFIER, CAUSAL = "ForSequenceClassification", "ForCausalLM"
PRETRAINED = {  # family: (class, config class, settings)
    "bert": ("Bert" + CLASSIFIER, "BertConfig", TEXT),
    "roberta": ("Roberta" + CLASSIFIER, "RobertaConfig", TEXT),
    "distilbert": ("DistilBert" + CLASSIFIER, "DistilBertConfig", SIZES | DISTIL),
    "electra": ("Electra" + CLASSIFIER, "ElectraConfig", TEXT | {"embedding_size": 16}),
    "mpnet": ("MPNet" + CLASSIFIER, "MPNetConfig", TEXT),
    "deberta_v2": ("DebertaV2" + CLASSIFIER, "DebertaV2Config", TEXT | DEBERTA),
    "modernbert": ("ModernBert" + CLASSIFIER, "ModernBertConfig", TEXT | MODERN),
    "albert": ("Albert" + CLASSIFIER, "AlbertConfig", TEXT | {"embedding_size": 16}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", SIZES | GPT2),
    "gpt2_classifier": ("GPT2" + CLASSIFIER, "GPT2Config", SIZES | GPT2),
    "llama": ("Llama" + CAUSAL, "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2" + CAUSAL, "Qwen2Config", GROUPED),
    "qwen3": (
        "Qwen3" + CAUSAL,
        "Qwen3Config",
        GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral" + CAUSAL, "MistralConfig", GROUPED),
    "mixtral": ("Mixtral" + CAUSAL, "MixtralConfig", GROUPED | {"num_local_experts": 2}),
    "gemma": ("Gemma" + CAUSAL, "GemmaConfig", GROUPED | {"head_dim": 16}),
    "phi": ("Phi" + CAUSAL, "PhiConfig", TEXT),
    "t5": ("T5ForConditionalGeneration", "T5Config", SIZES | T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", SIZES | BART),
    "bart_classifier": ("Bart" + CLASSIFIER, "BartConfig", SIZES | BART),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}


class Blocks(nn.Module):
    """Three blocks of two linears, and a head of two linears with numbers of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(
            [nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)) for _ in range(3)]
        )
        self.head = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, inputs):
        for block in self.encoder:
            inputs = inputs + block(inputs)
        return self.head(inputs)


def sequential():
    """Linears at 0, 2 and 4."""
    last = [nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)]
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), *last)


def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 4)


def pipeline():
    """An encoder behind a number that is not its layer."""
    return nn.Sequential(torch_encoder(), nn.Linear(32, 2))


PLAIN = {"sequential": sequential, "blocks": Blocks, "torch": torch_encoder, "pipeline": pipeline}

EXPECTED = {  # family: (masked matrices in each stack's middle layers, by the stack's name)
    "bert": {"bert.encoder.layer": {1: 6, 2: 6}},
    "roberta": {"roberta.encoder.layer": {1: 6, 2: 6}},
    "distilbert": {"distilbert.transformer.layer": {1: 6, 2: 6}},
    "electra": {"electra.encoder.layer": {1: 6, 2: 6}},
    "mpnet": {"mpnet.encoder.layer": {1: 6, 2: 6}},
    "deberta_v2": {"deberta.encoder.layer": {1: 6, 2: 6}},
    "modernbert": {"model.layers": {1: 4, 2: 4}},
    "albert": {"albert.encoder.albert_layer_groups": {0: 6}},  # one layer, used four times
    "gpt2": {"transformer.h": {1: 4, 2: 4}},
    "gpt2_classifier": {"transformer.h": {1: 4, 2: 4}},
    "llama": {"model.layers": {1: 7, 2: 7}},
    "qwen2": {"model.layers": {1: 7, 2: 7}},
    "qwen3": {"model.layers": {1: 7, 2: 7}},
    "mistral": {"model.layers": {1: 7, 2: 7}},
    "mixtral": {"model.layers": {1: 4, 2: 4}},  # the experts are stacked in one 3-D parameter
    "gemma": {"model.layers": {1: 7, 2: 7}},
    "phi": {"model.layers": {1: 6, 2: 6}},
    "t5": {"encoder.block": {1: 6, 2: 6}, "decoder.block": {1: 10, 2: 10}},
    "bart": {"model.encoder.layers": {1: 6, 2: 6}, "model.decoder.layers": {1: 10}},
    "bart_classifier": {"model.encoder.layers": {1: 6, 2: 6}, "model.decoder.layers": {1: 10}},
    "vit": {"vit.layers": {1: 6, 2: 6}},
    "sequential": {"": {2: 1}},
    "blocks": {"encoder": {1: 2}},
    "torch": {"layers": {1: 3, 2: 3}},
    "pipeline": {"0.layers": {1: 3, 2: 3}},
}
UNREACHED = {  # family: what no mask reaches in the chosen layers, as a warning names it
    "mixtral": "18,560 of the 24,704 weights .*mlp.experts.gate_up_proj",
    "torch": "6,144 of the 14,336 weights .*self_attn.in_proj_weight",
    "pipeline": "6,144 of the 14,336 weights .*self_attn.in_proj_weight",
}
HEADS = ("embed", "shared", "wte", "norm", "ln_", "pooler", "classif", "lm_head", "score", "head.")


def build(family):
    """A family's model in eval mode, the same weights in each call."""
    torch.manual_seed(0)
    if family in PLAIN:
        return PLAIN[family]().eval()
    model, config, settings = PRETRAINED[family]
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def logits_of(model):
    """Logits for two fixed inputs."""
    draw = torch.Generator().manual_seed(1)
    if not hasattr(model, "config"):
        return model(torch.randn(2, 5, 32, generator=draw))
    if "ViT" in type(model).__name__:
        return model(torch.randn(2, 3, 8, 8, generator=draw)).logits
    rows = torch.randint(3, 60, (2, 9), generator=draw)
    rows[:, -1] = 2  # BART's classifier reads the end token
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if "ConditionalGeneration" in type(model).__name__:
        inputs["decoder_input_ids"] = rows[:, :4]
    return model(**inputs).logits


def effective(model, names):
    """The matrices as the model uses them, by plain name."""
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return {name: module.weight.detach().clone() for name, module in modules.items()}


def same(first, second):
    """Whether two sets of named tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def two_steps(mft):
    """Two steps of AdamW toward fixed logits."""
    optimizer = torch.optim.AdamW(mft.scores, lr=0.1, weight_decay=0.0)
    mft.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        found = logits_of(mft.model)
        goal = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
        (found.float() - goal).square().sum().backward()
        optimizer.step()
    mft.model.eval()


def masked(family, model, config):
    """An MFT, and a warning where a family has weights that no mask reaches, only there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if family in UNREACHED:
            with pytest.warns(UserWarning, match=UNREACHED[family]):
                return MFT(model, config)
        return MFT(model, config)


@pytest.mark.parametrize("family", EXPECTED)
def test_mask_trains_saves_loads_and_merges(family, tmp_path):
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(maskable_weights(model))
    by_hand = [
        (f"{stack}.{layer}.".lstrip("."), count)
        for stack, layers in EXPECTED[family].items()
        for layer, count in layers.items()
    ]
    assert [sum(name.startswith(place) for name in names) for place, _ in by_hand] == [
        count for _, count in by_hand
    ]
    assert len(names) == sum(count for _, count in by_hand)
    assert not [name for name in names if any(part in name for part in HEADS)]

    mft = masked(family, model, MaskConfig(keep=0.7, init="normal"))
    start, first = [score.detach().clone() for score in mft.scores], mft.bitmask()
    assert list(first) == names and all(first[name].shape == before[name].shape for name in names)
    with torch.no_grad():  # the config leaves dropout off, in every family's own spelling of it
        assert torch.equal(logits_of(model.train()), logits_of(model))
    two_steps(mft)
    for name, score, old in zip(names, mft.scores, start, strict=True):
        assert score.grad is not None and score.grad.any(), f"no gradient at {name}"
        assert not torch.equal(score, old) and score.isfinite().all(), f"{name} did not move"
    assert mft.bitmask() != first
    for name, parameter in model.named_parameters():
        if "parametrizations" not in name:
            assert torch.equal(parameter, before[name]) and not parameter.requires_grad, name
    assert all(torch.equal(weight, before[name]) for name, weight in mft.base_weights().items())

    plain = mft.plain_state_dict()
    assert plain.keys() == before.keys(), "the state has the plain model's names"
    assert same({name: plain[name] for name in names}, effective(model, names))
    mft.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the rest of the model is that of the training
        loaded = MFT.from_pretrained(build(family), tmp_path)
    assert loaded.bitmask() == mft.bitmask() and list(loaded.model.state_dict()) == list(before)
    trained = effective(model, names)
    with torch.no_grad():
        logits = logits_of(model)
        assert (logits_of(loaded.model) - logits).abs().max() <= 1e-5
        assert (logits_of(build(family)) - logits).abs().max() > 1e-4, "the mask changes nothing"
    assert same(effective(loaded.model, names), trained)
    mask, merged = mft.bitmask(), mft.merge_and_unload()
    assert same(effective(merged, names), trained)
    assert all((merged.get_parameter(name)[~mask[name]] == 0).all() for name in names)
    assert list(merged.state_dict()) == list(before)
    left_whole = set(before) - set(names)
    assert all(torch.equal(merged.state_dict()[name], before[name]) for name in left_whole)
    with torch.no_grad():
        assert (logits_of(merged) - logits).abs().max() <= 1e-5
    assert same(loaded.unload().state_dict(), before)


@pytest.mark.parametrize("family", EXPECTED)
def test_wrong_names_and_layers_are_refused_with_what_there_is(family):
    model = build(family)
    assert set(find_layers(model)) == set(EXPECTED[family])
    assert layer_count(model) in (1, 3, 4)
    known = next(iter(maskable_weights(model)))
    with pytest.raises(ValueError, match="no_such.*matches no maskable weight.*" + known):
        maskable_weights(model, target_modules=["no_such"])
    with pytest.raises(ValueError, match="layers holds 99, but the model's layers are 0"):
        maskable_weights(model, layers=[99])
    with pytest.raises(ValueError, match="no_such.*matches no linear weight.* There are .*weight"):
        maskable_weights(model, exclude_modules=["no_such"])
    everything = maskable_weights(model, layers="all")
    inside = tuple(f"{stack}.".lstrip(".") for stack in EXPECTED[family])
    assert set(maskable_weights(model)) <= set(everything)
    assert all(name.startswith(inside) for name in everything), "all means all layers"


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma", "t5", "bart"])
def test_a_tied_output_layer_stays_tied_and_is_refused_by_name(family):
    model = build(family)
    asked = {"layers": "all", "target_modules": ["lm_head"], "exclude_modules": ()}
    with pytest.raises(ValueError, match="'lm_head.weight' is one tensor with "):
        maskable_weights(model, **asked)
    assert "lm_head.weight" not in maskable_weights(model, layers="all", exclude_modules=())
    merged = MFT(model, MaskConfig(layers="all", exclude_modules=())).merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_an_output_layer_that_is_not_tied_is_masked_when_asked_for():
    asked = {"layers": "all", "target_modules": ["lm_head"], "exclude_modules": ()}
    assert list(maskable_weights(build("llama"), **asked)) == ["lm_head.weight"]


def test_layers_mean_both_stacks_unless_narrowed():
    model = build("bart")
    both = maskable_weights(model, layers=[0, 3])
    assert {name.split(".")[1] for name in both} == {"encoder", "decoder"}
    assert {name[:22] for name in both if ".3." in name} == {"model.encoder.layers.3"}
    decoder = maskable_weights(model, layers=[0], target_modules=[r"^model\.decoder"])
    assert len(decoder) == 10


def test_a_weight_that_something_else_computes_is_refused_by_name():
    from torch.nn.utils import parametrizations, prune

    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda module: prune.random_unstructured(module, "weight", 0.5),
    ):
        model = sequential()
        change(model[2])
        with pytest.raises(ValueError, match="'2.weight' cannot be masked: it is computed from"):
            MFT(model, MaskConfig(layers="all"))
        assert list(maskable_weights(model, "all", exclude_modules=["^2"])) == [
            "0.weight",
            "4.weight",
        ]
        assert list(maskable_weights(model, [0])) == ["0.weight"], "elsewhere it does not matter"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_or_lazy_weight_is_refused_by_name():
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.testing._internal.two_tensor import TwoTensor

    model = sequential()
    for changed, reason in (
        (Linear(32, 32), "is quantized"),
        (nn.LazyLinear(32), "has no shape yet"),
        (half_packed(torch.ones(32, 32, dtype=torch.int8)), "stored as int8"),
        (half_packed(torch.ones(32, 32).to(torch.float8_e4m3fn)), "stored as float8_e4m3fn"),
        (half_packed(TwoTensor(torch.ones(32, 32), torch.ones(32, 32))), "is quantized"),
    ):
        model[2] = changed
        with pytest.raises(ValueError, match=f"'2.weight' cannot be masked: it .*{reason}"):
            maskable_weights(model, "all")


def half_packed(weight):
    linear = nn.Linear(32, 32)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_a_shared_layer_is_left_whole():
    block = nn.Linear(32, 32)
    model = nn.Sequential(block, nn.Tanh(), block, nn.Tanh(), nn.Linear(32, 2))
    assert list(maskable_weights(model, "all")) == ["4.weight"]
    with pytest.raises(ValueError, match="'2.weight' is one tensor with '0.weight'"):
        maskable_weights(model, "all", target_modules=["^2"])
    with pytest.raises(ValueError, match="2 are used in two places"):
        maskable_weights(model, [0, 2])


def test_numbers_at_the_end_of_a_word_are_layers():
    names = {f"encoder_layer_{place}": Blocks().encoder[0] for place in range(6)}
    model = nn.ModuleDict({"layers": nn.ModuleDict(names)})
    assert find_layers(model) == {"layers.encoder_layer_": (0, 1, 2, 3, 4, 5)}
    assert {name.split(".")[1] for name in maskable_weights(model)} == {
        "encoder_layer_2",
        "encoder_layer_3",
    }


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_torch_sees_the_mask(norm_first, padded, monkeypatch):
    """In eval mode torch's encoder hands its raw weights to one fused kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    plain = copy.deepcopy(model)
    calls, fused = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch,
        "_transformer_encoder_layer_fwd",
        lambda *values, **named: calls.append(1) or fused(*values, **named),
    )
    inputs = torch.randn(2, 5, 32)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    seen = slice(None) if hidden is None else ~hidden
    with pytest.warns(UserWarning, match="no mask reaches them: layers.0.self_attn.in_proj_weight"):
        mft = MFT(model, MaskConfig(layers="all", keep=0.5))
    assert any("out_proj" in name for name in mft.bitmask())
    slow = model(inputs, src_key_padding_mask=hidden).detach()
    assert not calls
    with torch.no_grad():
        masked = model(inputs, src_key_padding_mask=hidden)
        merged = mft.merge_and_unload()(inputs, src_key_padding_mask=hidden)
        base = plain(inputs, src_key_padding_mask=hidden)
    assert len(calls) == 9, "each of three models ran the fused kernel in each of three layers"
    assert (masked - merged)[seen].abs().max() <= 1e-5
    assert (slow - merged)[seen].abs().max() <= 1e-5
    assert (base - merged)[seen].abs().max() > 1e-2
