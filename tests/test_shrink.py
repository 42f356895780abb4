"""Pruned neurons and heads taken out, 2:4 matrices stored sparsely: the same answers."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    _semi_structured_conversions,
)

import mft_nb.shrink
from mft_nb.mask import MFT, MaskConfig
from mft_nb.shrink import shrink
from tests.test_families import PRETRAINED, SIZES, T5, TEXT

OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40}
OPT |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
MORE = {
    "opt": ("OPTForCausalLM", "OPTConfig", SIZES | OPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", PRETRAINED["gemma"][2]),
    "t5_gated": ("T5ForConditionalGeneration", "T5Config", SIZES | T5),
}
MORE["t5_gated"][2]["feed_forward_proj"] = "gated-gelu"
FAMILIES = PRETRAINED | MORE
ENDS = {  # of the matrices that a neuron has a row in, by family
    "gpt2": ("c_fc",),
    "gpt2_classifier": ("c_fc",),
    "distilbert": ("lin1",),
    "vit": ("fc1",),
    "opt": ("fc1",),
    "phi": ("fc1",),
    "gpt_neox": ("dense_h_to_4h",),
    "t5": ("wi",),
    "t5_gated": ("wi_0", "wi_1"),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2"), ("up_proj",)),
    **dict.fromkeys(("bert", "roberta", "electra", "mpnet", "deberta_v2"), ("intermediate.dense",)),
}
WITH_HEADS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "vit")
UNKNOWN = ("modernbert", "albert", "mixtral")  # fused gates, one layer for all, experts


def made(family, **changes):
    """A tiny model of a family with biases that are not zero."""
    kind, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**(settings | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def answer(model, family):
    """Logits for two examples."""
    torch.manual_seed(1)
    if family == "vit":
        return model(pixel_values=torch.randn(2, 3, 8, 8)).logits
    inputs = {"input_ids": torch.randint(3, 60, (2, 7))}
    if "t5" in family:
        inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 5))
    return model(**inputs).logits


def prune_rows(model, ends, counts=(10, 12, 11, 13)):
    """Set rows of the matrices that go up to zero, in each layer others."""
    for end in ends:
        matrices = [one for name, one in model.named_modules() if name.endswith(f".{end}")]
        for place, matrix in enumerate(matrices):
            torch.manual_seed(place)
            rows = torch.randperm(48)[: counts[place % 4]]
            weight = matrix.weight if isinstance(matrix, nn.Linear) else matrix.weight.T
            weight[rows[rows < len(weight)]] = 0


def check_same(model, smaller, family, folder):
    """The same answers; also after saving, and loading by the class alone."""
    assert torch.allclose(answer(model, family), answer(smaller, family), atol=1e-5)
    smaller.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert torch.equal(answer(loaded, family), answer(smaller, family))
    assert type(smaller) is type(model) and smaller.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("family", ENDS)
def test_neurons_are_taken_out_of_every_family(family, tmp_path):
    model = made(family)
    prune_rows(model, ENDS[family])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller = shrink(model)
    check_same(model, smaller, family, tmp_path)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


@pytest.mark.parametrize("family", WITH_HEADS)
def test_heads_are_taken_out_where_the_config_can_say_it(family, tmp_path):
    changes = {"hidden_size": 64, "num_attention_heads": 4}
    if family != "vit":
        changes["num_key_value_heads"] = 2
    model, places = made(family, **changes), ((0, 1), (2, 3), (0, 1, 3), (0, 1, 2))
    outputs = [one for name, one in model.named_modules() if name.endswith("o_proj")]
    for matrix, pruned in zip(outputs, places, strict=True):
        size = matrix.weight.shape[1] // 4
        for head in pruned:
            matrix.weight[:, head * size : (head + 1) * size] = 0
    smaller = shrink(model)
    assert smaller.config.num_attention_heads == 2
    if family != "vit":
        assert smaller.config.num_key_value_heads == 1
    check_same(model, smaller, family, tmp_path)


def test_half_the_heads_of_each_group_may_go():
    model = made("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, :16] = 0
        layer.self_attn.o_proj.weight[:, 48:] = 0
    smaller = shrink(model)
    config = smaller.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    assert torch.allclose(answer(model, "llama"), answer(smaller, "llama"), atol=1e-5)


def test_heads_and_neurons_go_together(tmp_path):
    model = made("mistral", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prune_rows(model, ("up_proj",))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, :32] = 0
    smaller = shrink(model)
    assert (smaller.config.num_attention_heads, smaller.config.intermediate_size) == (2, 38)
    check_same(model, smaller, "mistral", tmp_path)


STAY = ("bert", "distilbert", "mpnet", "deberta_v2", "t5", "opt", "gpt2", "gpt_neox")


@pytest.mark.parametrize("family", STAY)
def test_heads_that_must_stay_are_refused_or_named(family):
    model = made(family)
    names = ("attention.output.dense", "out_lin", "attn.o", "Attention.o", "out_proj")
    names += ("attn.c_proj", "attention.dense")
    for name, module in model.named_modules():
        if name.endswith(names):
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            weight[:, : weight.shape[1] // 2] = 0
    with pytest.raises(ValueError, match="cannot be made with another number of heads"):
        shrink(model)
    prune_rows(model, ENDS[family])
    with pytest.warns(UserWarning, match="Pruned heads stay as zeros"):
        smaller = shrink(model)
    assert torch.allclose(answer(model, family), answer(smaller, family), atol=1e-5)


@pytest.mark.parametrize("family", UNKNOWN)
def test_layers_of_a_kind_that_is_not_known_are_refused(family):
    with pytest.raises(ValueError, match="layers are known.* use that, at its full"):
        shrink(made(family))


def test_two_sizes_in_one_config_are_refused():
    model = made("bart")
    prune_rows(model, ("fc1",))
    with pytest.raises(ValueError, match="BartConfig has none of.* use that, at its full"):
        shrink(model)


def test_a_layer_that_is_full_is_named():
    model = made("bert")
    prune_rows(model, ("intermediate.dense",))
    nn.init.normal_(model.bert.encoder.layer[2].intermediate.dense.weight)
    with pytest.raises(ValueError, match="layer.2.output.dense needs all of its inputs"):
        shrink(model)


def test_what_was_put_on_is_refused_by_name():
    model = made("bert")
    prune_rows(model, ("intermediate.dense",))
    model.extra = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="a new BertForSequenceClassification in extra"
    ):
        shrink(model)


def test_type_mode_and_random_state_are_kept():
    model = made("llama").to(torch.bfloat16).train()
    prune_rows(model, ("up_proj",))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    smaller = shrink(model)
    assert torch.equal(before, torch.get_rng_state())
    assert smaller.training and smaller.dtype == torch.bfloat16
    assert smaller.generation_config is not model.generation_config


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_mask_of_neurons_that_is_still_trained_is_shrunk(family, tmp_path):
    pattern = "intermediate.dense" if family == "bert" else "up_proj"
    model = made(family)
    config = MaskConfig(layers="all", scope="neuron", keep=0.5, target_modules=[pattern])
    mft = MFT(model, config)
    smaller = shrink(mft.model)
    assert smaller.config.intermediate_size == 24
    check_same(mft.model.eval(), smaller, family, tmp_path)
    assert mft.bitmask().density == 0.5  # the mask is still on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of neurons pruned whole, which is what was asked for
        merged = mft.merge_and_unload()
    assert torch.equal(answer(shrink(merged), family), answer(smaller, family))


@pytest.mark.parametrize("family", ENDS)
def test_a_mask_of_coupled_neurons_is_taken_out_of_every_family(family, tmp_path):
    model = made(family)
    before = model.num_parameters()
    mft = MFT(model, MaskConfig(layers="all", scope="ffn", keep=0.75, init="normal"))
    units = sum(score.numel() for score in mft.scores)
    assert units == sum(max(mask.shape) for mask in mft.bitmask().values())  # 48 a layer
    smaller = mft.shrink()
    assert torch.allclose(answer(model, family), answer(smaller, family), atol=1e-5)
    assert smaller.num_parameters() < before
    smaller.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, family), answer(smaller, family))
    assert mft.bitmask().density == 0.75  # the mask is still on


@pytest.mark.parametrize("family", WITH_HEADS)
def test_a_mask_of_neurons_and_heads_is_taken_out(family, tmp_path):
    changes = {"hidden_size": 64, "num_attention_heads": 4}
    model = made(family, **changes | ({} if family == "vit" else {"num_key_value_heads": 4}))
    mft = MFT(model, MaskConfig(layers="all", scope="unit", keep=0.5, init="normal"))
    smaller = mft.shrink()
    assert smaller.config.num_attention_heads == 2
    assert torch.allclose(answer(model, family), answer(smaller, family), atol=1e-5)
    smaller.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, family), answer(smaller, family))


def test_a_coupled_neuron_is_its_row_bias_and_column():
    model = made("bert")
    mft = MFT(model, MaskConfig(layers="all", scope="ffn", keep=0.5, init="normal"))
    masked, mask = answer(model, "bert"), mft.bitmask()
    plain = mft.unload()
    for layer, kept in zip(plain.bert.encoder.layer, mask.values(), strict=True):
        gone = ~kept.any(dim=0)
        layer.intermediate.dense.weight[gone] = 0
        layer.intermediate.dense.bias[gone] = 0
        layer.output.dense.weight[:, gone] = 0
    assert torch.equal(answer(plain, "bert"), masked)


def test_the_gradient_of_a_coupled_score_is_that_of_a_switch():
    model = made("bert")
    mft = MFT(model, MaskConfig(layers="all", scope="ffn", keep=1.0))
    (answer(model, "bert") ** 2).sum().backward()
    scores = [score.grad.flatten() for score in mft.scores]
    plain, switches = mft.unload(), []
    for layer in plain.bert.encoder.layer:
        switches.append(torch.ones(48, requires_grad=True))
        layer.output.dense.register_forward_pre_hook(lambda _, x, s=switches[-1]: (x[0] * s,))
    loss = (answer(plain, "bert") ** 2).sum()
    for score, switch in zip(scores, torch.autograd.grad(loss, switches), strict=True):
        assert torch.allclose(score, switch, rtol=1e-4, atol=1e-5)


def test_a_file_of_neurons_is_one_bit_each(tmp_path):
    model = made("bert", intermediate_size=1536)
    mft = MFT(model, MaskConfig(layers="all", scope="ffn", keep=0.5, init="normal"))
    mask, size = mft.bitmask(), mft.save_pretrained(tmp_path).stat().st_size
    assert size < 4 * 1536 / 8 + 900
    again = MFT.from_pretrained(mft.unload(), tmp_path)
    assert again.bitmask() == mask
    assert again.shrink().config.intermediate_size == 768
class OnCpu(SparseSemiStructuredTensorCUTLASS):
    """Torch's sparse tensor with its own packing and dispatch, and a product for the CPU."""

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **_):
        unpack = _semi_structured_conversions.sparse_semi_structured_to_dense_cutlass
        product = unpack(self.packed, self.meta) @ (B.t() if should_transpose_dense else B)
        product = product if bias is None else product + bias[:, None]
        return product.t() if should_transpose_dense else product


def packed_on_cpu(dense):
    """What `to_sparse_semi_structured` does, without its check of the device."""
    pack = _semi_structured_conversions.sparse_semi_structured_from_dense_cutlass
    packed, meta = pack(dense)
    rest = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
    return OnCpu(dense.shape, packed=packed, meta=meta, **rest)


@pytest.fixture
def a_gpu(monkeypatch):
    """The CPU passes for a GPU that stores 2:4 matrices."""
    monkeypatch.setattr(mft_nb.shrink, "_check_sparse", lambda sparse, device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", packed_on_cpu)


WIDE = {"hidden_size": 64, "intermediate_size": 128}
WIDER = {  # by family: sizes that torch can store
    "bert": WIDE,
    "roberta": WIDE,
    "mpnet": WIDE,
    "deberta_v2": WIDE,
    "distilbert": {"dim": 64, "hidden_dim": 128},
    "vit": WIDE,
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": WIDE,
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 32},
    "llama": WIDE,
    "qwen3": WIDE | {"head_dim": 32},
    "gemma2": WIDE | {"head_dim": 32},
}


def two_of_four(family):
    """A model with a 2:4 mask baked into two layers, and the names of its masked modules."""
    model = made(family, **WIDER[family]).to(torch.bfloat16)
    mft = MFT(model, MaskConfig(layers=[1, 2], scope="2:4", keep=0.5))
    names = [name.removesuffix(".weight") for name in mft.base_weights()]
    return mft.merge_and_unload().eval(), names


def sparse_names(model):
    """Where a model has a sparse tensor."""
    return [n for n, one in model.named_modules() if isinstance(getattr(one, "weight", 0), OnCpu)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructured")
@pytest.mark.parametrize("family", WIDER)
def test_matrices_with_two_of_four_are_stored_sparsely(family, a_gpu):
    model, names = two_of_four(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = shrink(model, sparse="2:4")
    assert sorted(sparse_names(sparse)) == sorted(names) and type(sparse) is type(model)
    assert not sparse.training and not any(p.requires_grad for p in sparse.parameters())
    with torch.inference_mode():
        expected, found = (answer(one, family).float() for one in (model, sparse))
    assert (expected - found).abs().max() <= 0.03 * expected.abs().max()  # bfloat16's rounding
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_a_stand_in_that_stays_dense_gives_the_same_logits(a_gpu, monkeypatch):
    given = []
    stand_in = "to_sparse_semi_structured"
    monkeypatch.setattr(torch.sparse, stand_in, lambda one: given.append(one.shape) or one)
    model, names = two_of_four("llama")
    assert torch.equal(answer(shrink(model, sparse="2:4"), "llama"), answer(model, "llama"))
    assert len(given) == len(names) == 14


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructured")
def test_a_mask_that_is_still_on_is_stored_sparsely(a_gpu):
    model = made("bert", **WIDER["bert"]).to(torch.float16)
    mft = MFT(model, MaskConfig(layers=[2], scope="2:4", keep=0.5))
    sparse = shrink(model, sparse="2:4")
    assert len(sparse_names(sparse)) == 6 and mft.bitmask().density == 0.5
    with pytest.raises(ValueError, match="weight is a sparse tensor already, which cannot be cut"):
        shrink(sparse, sparse="2:4")
    mft.merge_and_unload()
    assert sparse_names(shrink(model, sparse="2:4")) == sparse_names(sparse)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructured")
def test_a_sparse_model_is_saved_as_a_dense_one(a_gpu, tmp_path):
    model, names = two_of_four("bert")
    sparse = shrink(model, sparse="2:4")
    with pytest.raises((NotImplementedError, RuntimeError)):
        sparse.save_pretrained(tmp_path / "sparse")
    model.save_pretrained(tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert sorted(sparse_names(shrink(loaded, sparse="2:4"))) == sorted(names)


def test_neurons_go_first_and_the_rest_is_stored_sparsely(a_gpu):
    model, names = two_of_four("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[:64] = 0
    smaller = shrink(model)
    assert smaller.config.intermediate_size == 64
    assert sorted(sparse_names(shrink(smaller, sparse="2:4"))) == sorted(names)


REFUSED = {  # what is missing: the word, the change, what is said
    "word": ("4:8", lambda model: model, "sparse is '4:8'; allowed are '2:4' and None"),
    "mask": ("2:4", lambda model: made("bert"), "but no linear matrix of the model is"),
    "dtype": ("2:4", lambda model: model.float(), "float16 or bfloat16, but bert.*is float32"),
}


@pytest.mark.parametrize("missing", REFUSED)
def test_what_is_missing_for_sparse_matrices_is_named(missing, monkeypatch):
    word, change, said = REFUSED[missing]
    on_gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(transformers.PreTrainedModel, "device", on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=said) as refusal:
        shrink(change(two_of_four("bert")[0]), sparse=word)
    assert str(refusal.value).startswith("sparse is ") and "\n" not in str(refusal.value)


def test_a_device_without_sparse_products_is_refused(monkeypatch):
    model, _ = two_of_four("bert")
    with pytest.raises(ValueError, match="needs a CUDA GPU, but the model is on the device cpu"):
        shrink(model, sparse="2:4")
    monkeypatch.setattr(transformers.PreTrainedModel, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="8.0 or newer, but that of cuda:0 is 7.5"):
        shrink(model, sparse="2:4")


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructured")
def test_shapes_that_torch_cannot_store_stay_dense_or_are_refused(a_gpu):
    narrow = made("bert").to(torch.bfloat16)  # 32 inputs
    MFT(narrow, MaskConfig(layers=[1], scope="2:4", keep=0.5)).merge_and_unload()
    with pytest.raises(ValueError, match="is 32 x 32, and torch needs multiples of 32 x 64. No"):
        shrink(narrow, sparse="2:4")
    mixed = made("bert", hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    MFT(mixed, MaskConfig(layers=[1], scope="2:4", keep=0.5)).merge_and_unload()
    with pytest.warns(UserWarning, match="1 of 6 2:4 matrices stay dense: .* is 64 x 96") as said:
        sparse = shrink(mixed, sparse="2:4")
    assert len(sparse_names(sparse)) == 5
    assert said[0].filename == __file__


def test_the_shapes_are_those_of_both_libraries():
    for library in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        for dtype in (torch.float16, torch.bfloat16):
            limits = library._DTYPE_SHAPE_CONSTRAINTS[dtype]
            rows, columns = mft_nb.shrink._BLOCK
            assert rows % limits.sparse_min_rows == columns % limits.sparse_min_cols == 0


def test_what_torch_cannot_do_is_told_in_a_sentence(a_gpu, monkeypatch):
    def fails(dense):
        raise RuntimeError("architecture mismatch when calling `cusparseLtInit`.\nMore lines")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", fails)
    with pytest.raises(ValueError, match="could not store bert.* mismatch when .*. Take another"):
        shrink(two_of_four("bert")[0], sparse="2:4")
