"""A mask as a method of PEFT: what PEFT's own tests ask of a method, and the engine's promises."""

import copy
import json
import pickle
import runpy
import subprocess
import sys
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    mapping,
)
from torch import nn
from transformers import GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mft_nb.mask import MFT
from mft_nb.mask_file import load_mask
from mft_nb.peft import MftConfig, adapter_to_mask, mask_to_adapter
from mft_nb.peft_layers import MftLayer, adapter_mask
from mft_nb.switch import MaskSwitch
from tests.models import (
    copied_state,
    same_state,
    tiny_bart,
    tiny_bert,
    tiny_gpt2_config,
    tiny_llama,
    train_steps,
    trainer_for,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
TOKENS = torch.arange(5, 19).reshape(2, 7)
TOKENS[:, -1] = 2  # BART's mark of an end


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(tiny_gpt2_config()).eval()


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=50, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def tiny_encoder():
    """torch's own encoder layer, whose fast path and attention read `weight`."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def inputs_for(model):
    """What a forward pass of a tiny model takes."""
    if isinstance(model, nn.TransformerEncoder):
        return (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)),), {}
    options = {"decoder_input_ids": TOKENS} if hasattr(model, "shared") else {}
    return (TOKENS,), options


def output_of(model, like=None):
    """Logits, or what stands for them."""
    inputs, options = inputs_for(like or model)
    with torch.no_grad():
        found = model(*inputs, **options)
    return getattr(found, "logits", found)


def train(model, steps=3, rate=0.02):
    """Some steps of AdamW on what asks for a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    inputs, options = inputs_for(model.get_base_model())
    for _ in range(steps):
        found = model(*inputs, **options)
        getattr(found, "logits", found).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


FAMILIES = {
    "llama": (tiny_llama, {}),
    "gpt2": (tiny_gpt2, {"scope": "layer"}),
    "bert": (tiny_bert, {"scope": "neuron", "keep": 0.75, "task_type": "SEQ_CLS"}),
    "bart": (tiny_bart, {"scope": "global"}),
    "t5": (tiny_t5, {}),
    "torch": (tiny_encoder, {"scope": "2:4", "keep": 0.5}),
}


@pytest.mark.filterwarnings("ignore:.*weights in the chosen layers are left whole")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_to_an_output_agree(family, tmp_path):
    make, settings = FAMILIES[family]
    config = MftConfig(**{"layers": "all", "keep": 0.7} | settings)
    model = train(get_peft_model(make(), config))
    masked, base = output_of(model, model.get_base_model()), output_of(make())
    assert not torch.equal(masked, base)
    mask = model.bitmask()
    if config.scope in ("tensor", "neuron", "2:4"):
        by_tensor = mask.density_by_tensor().values()
        assert all(abs(one - config.keep) < 0.07 for one in by_tensor)
    with model.disable_adapter():
        if not config.task_type:  # else PEFT trains a copy of the head, which is off too
            assert torch.equal(output_of(model, model.get_base_model()), base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert loaded.bitmask() == mask
    assert torch.equal(output_of(loaded, loaded.get_base_model()), masked)
    adapter_to_mask(tmp_path / "adapter", tmp_path / "mask", make())
    mft = MFT.from_pretrained(make(), tmp_path / "mask")
    assert mft.bitmask() == mask and torch.equal(output_of(mft.model), masked)
    mask_to_adapter(tmp_path / "mask", tmp_path / "bits", make(), config.task_type)
    bits = PeftModel.from_pretrained(make(), tmp_path / "bits")
    assert bits.bitmask() == mask
    assert torch.equal(output_of(bits, bits.get_base_model()), masked)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, MftLayer) for module in merged.modules())
    assert torch.equal(output_of(merged), masked)
    names = {name for name, _ in make().named_parameters()}
    assert {name for name, _ in merged.named_parameters()} == names


SETTINGS = [
    {"scope": "tensor"},
    {"scope": "layer", "init": "normal", "init_seed": 3},
    {"scope": "global", "init": "normal", "ranking": "absolute"},
    {"scope": "2:4", "keep": 0.5},
    {"scope": "neuron", "init": "ones"},
    {"scope": "unit", "keep": 0.5},
    {"scope": "ffn", "layers": [1]},
    {"schedule": [(0, 1.0), (2, 0.8)]},
    {"l1": 0.01, "l1_reduction": "mean", "init": "normal"},
]


@pytest.mark.filterwarnings("ignore:.*weights in the chosen layers are left whole")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))
def test_training_is_that_of_mft(settings):
    settings = {"layers": "all", "keep": 0.8} | settings
    config = MftConfig(**settings)
    mft = MFT(tiny_bert().train(), config.mask_config())
    model = get_peft_model(tiny_bert().train(), config)
    assert model.bitmask() == mft.bitmask()
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = {"lr": 0.02, "weight_decay": 0}
    train_steps(mft)
    train_steps(None, model=model, optimizer=torch.optim.AdamW(ours, **rate))
    assert len(ours) == len(mft.scores)
    assert all(map(torch.equal, ours, mft.scores))
    torch.testing.assert_close(model.penalty(), mft.penalty(), rtol=0, atol=0)
    assert model.bitmask() == mft.bitmask()


def hooks_of(model):
    """How many hooks each module has."""
    return [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]


@pytest.mark.parametrize("merge", [False, True])
def test_taken_off_it_leaves_nothing(merge):
    model = tiny_bert(dropout=0.1).train()
    model.bert.embeddings.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    kinds, hooks = [type(module) for module in model.modules()], hooks_of(model)
    before, config = copied_state(model), copy.deepcopy(model.config.to_dict())
    peft_model = get_peft_model(model, MftConfig(layers="all", task_type="SEQ_CLS"))
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    train_steps(None, model=peft_model, optimizer=torch.optim.AdamW(peft_model.parameters(), 0.02))
    mask, head = peft_model.bitmask(), peft_model.base_model.model.classifier.weight.clone()
    assert not torch.equal(head, before["classifier.weight"])
    plain = peft_model.merge_and_unload() if merge else peft_model.unload()
    assert plain is model and model.config.to_dict() == config
    assert {name: one.requires_grad for name, one in model.named_parameters()} == asked
    assert [type(module) for module in model.modules()] == kinds and hooks_of(model) == hooks
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates and set(rates) == {0.1}
    if not merge:
        assert same_state(model, before)
        return
    assert torch.equal(model.classifier.weight, head)
    for name, kept in mask.items():
        assert torch.equal(model.get_parameter(name), before[name].where(kept, 0))
    MFT(model, MftConfig().mask_config()).unload()  # nothing holds the weights any more


def test_several_adapters_and_switching(tmp_path):
    model = get_peft_model(tiny_llama(), MftConfig(layers="all", keep=0.5))
    model.add_adapter("other", MftConfig(layers=[1], keep=0.8, init="normal"))
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained and all(".default." in name for name in trained)
    first = output_of(model)
    model.set_adapter("other")
    train(model)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained and all(".other." in name for name in trained)
    second = output_of(model)
    mask = model.bitmask()
    assert {name.split(".")[2] for name in mask} == {"1"} and mask != model.bitmask("default")
    model.set_adapter("default")
    assert torch.equal(output_of(model), first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "renamed")
    assert torch.equal(output_of(loaded), first)
    loaded.set_adapter("renamed")
    assert torch.equal(output_of(loaded), second) and loaded.bitmask() == mask
    loaded.delete_adapter("renamed")
    assert torch.equal(output_of(loaded), first)
    loaded.delete_adapter("default")
    assert torch.equal(output_of(loaded.base_model), output_of(tiny_llama()))
    assert same_state(loaded.unload(), tiny_llama().state_dict())


def test_active_together_a_weight_stays_where_all_keep_it():
    model = get_peft_model(tiny_llama(), MftConfig(layers="all", keep=0.5))
    model.add_adapter("other", MftConfig(layers=[1], keep=0.8, init="normal"))
    model.base_model.set_adapter(["default", "other"])
    both = {**model.bitmask("default")}
    for name, kept in model.bitmask("other").items():
        both[name] = both[name] & kept
    expected = tiny_llama()
    for name, kept in both.items():
        expected.get_parameter(name).data[~kept] = 0
    together = output_of(model)
    assert torch.equal(together, output_of(expected))
    train(model, steps=1)
    moved = [name for name, one in model.named_parameters() if one.requires_grad]
    assert any(".other." in name for name in moved) and any(".default." in name for name in moved)
    with pytest.raises(ValueError, match="so name the one"):
        model.bitmask()
    together = output_of(model)
    model.merge_adapter()
    assert torch.equal(output_of(model), together)
    model.unmerge_adapter()
    assert torch.equal(output_of(model), together)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert torch.equal(output_of(merged), together)


def test_merged_for_a_while_and_back():
    model = get_peft_model(tiny_llama(), MftConfig(layers="all", scope="global"))
    masked = output_of(model)
    model.merge_adapter(safe_merge=True)
    layer = next(one for one in model.modules() if isinstance(one, MftLayer))
    assert (layer.base_layer.weight == 0).any() and torch.equal(output_of(model), masked)
    with pytest.raises(ValueError, match="set weights to zero"):
        model.add_adapter("other", MftConfig(layers="all"))
    assert list(model.peft_config) == ["default"]
    twin = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(output_of(model), output_of(tiny_llama()))  # PEFT unmerges then
    assert twin.base_model.model is not model.base_model.model
    assert same_state(twin.unload(), tiny_llama().state_dict())
    assert same_state(model.unload(), tiny_llama().state_dict())


@pytest.mark.parametrize("convert", [mask_to_adapter, adapter_to_mask])
def test_files_are_converted_for_plain_models_alone(convert, tmp_path):
    MFT(tiny_llama()).save_pretrained(tmp_path / "mask")
    get_peft_model(tiny_llama(), MftConfig()).save_pretrained(tmp_path / "adapter")
    given = tmp_path / ("mask" if convert is mask_to_adapter else "adapter")
    lora = LoraConfig(target_modules=["q_proj"])
    for config, next_step in ((MftConfig(), r"unload\(\)"), (lora, "unload")):
        wrapped = get_peft_model(tiny_llama(), config)
        with pytest.raises(ValueError, match=next_step):
            convert(given, tmp_path / "made", wrapped)
    masked = tiny_llama()
    MFT(masked)
    with pytest.raises(ValueError, match=r"carries a mask.*unload\(\)"):
        convert(given, tmp_path / "made", masked)
    with pytest.raises(TypeError, match="model is a str; allowed is a torch.nn.Module"):
        convert(given, tmp_path / "made", "my-model")
    assert not (tmp_path / "made").exists()


def test_an_adapter_is_known_where_its_config_was_defined_twice(tmp_path, monkeypatch):
    get_peft_model(tiny_llama(), MftConfig()).save_pretrained(tmp_path / "adapter")
    for kind in ("CONFIG", "TUNER", "PREFIX"):  # put back afterwards
        known = getattr(mapping, f"PEFT_TYPE_TO_{kind}_MAPPING")
        monkeypatch.setitem(known, "MFT", known["MFT"])
    again = runpy.run_module("mft_nb.peft")["MftConfig"]  # as by a notebook of this process
    assert type(PeftConfig.from_pretrained(tmp_path / "adapter")) is again is not MftConfig
    adapter_to_mask(tmp_path / "adapter", tmp_path, tiny_llama())
    assert load_mask(tmp_path / "mask.safetensors").mask.density == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("form", ["scores", "bits"])
def test_models_of_transformers_load_adapters_themselves(form, tmp_path):
    config = MftConfig(layers="all", keep=0.6, schedule=[(0, 0.9), (2, 0.6)])
    model = train(get_peft_model(tiny_llama(), config), steps=4)
    model.save_pretrained(tmp_path / "scores")
    adapter_to_mask(tmp_path / "scores", tmp_path, tiny_llama())
    mask_to_adapter(tmp_path, tmp_path / "bits", tiny_llama())
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path / form), adapter_name="mine")
    assert adapter_mask(loaded) == model.bitmask()
    assert torch.equal(output_of(loaded), output_of(model))
    assert not any(one.requires_grad for n, one in loaded.named_parameters() if "mft" in n)
    loaded.disable_adapters()
    assert torch.equal(output_of(loaded), output_of(tiny_llama()))
    loaded.enable_adapters()
    loaded.add_adapter(MftConfig(layers=[0], keep=0.5), "more")
    assert adapter_mask(loaded).density == pytest.approx(0.5, abs=0.01)
    assert adapter_mask(loaded, "mine") == model.bitmask()
    loaded.set_adapter("mine")
    assert torch.equal(output_of(loaded), output_of(model))
    loaded.delete_adapter(["mine", "more"])
    assert torch.equal(output_of(loaded), output_of(tiny_llama()))


def test_checkpoints_hold_the_adapter_alone_and_a_run_goes_on(tmp_path):
    def trainer(folder, **options):
        schedule = {"keep": 0.8, "schedule": [(0, 1.0), (6, 0.8)]}
        config = MftConfig(layers="all", task_type="SEQ_CLS", **schedule)
        settings = {"save_strategy": "steps", "save_steps": 6} | options
        return trainer_for(get_peft_model(tiny_bert(), config), folder, **settings)

    whole = trainer(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    held = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in held and "model.safetensors" not in held
    scores = sum(one.numel() for n, one in whole.model.named_parameters() if "mft_masks" in n)
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert size < 4 * scores + 20_000
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    first, second = whole.model.state_dict(), again.model.state_dict()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert whole.model.bitmask() == again.model.bitmask()


def test_it_goes_on_from_a_saved_adapter(tmp_path):
    model = train(get_peft_model(tiny_llama(), MftConfig(layers="all")))
    model.save_pretrained(tmp_path)
    more = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert train(more).bitmask() != model.bitmask()
    lean = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert lean.bitmask() == model.bitmask() and torch.equal(output_of(lean), output_of(model))
    assert not any(parameter.requires_grad for parameter in lean.parameters())
    half = model.to(torch.bfloat16)
    assert half.bitmask() == lean.bitmask()
    assert all(one.dtype == torch.float32 for n, one in half.named_parameters() if "scores" in n)


def test_auto_classes_find_the_base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = train(get_peft_model(base, MftConfig(layers="all", task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found.bitmask() == model.bitmask() and torch.equal(output_of(found), output_of(model))
    generated = [one.generate(TOKENS, max_new_tokens=3, do_sample=False) for one in (found, model)]
    assert torch.equal(*generated)
    plain = type(base).from_pretrained(tmp_path / "base")
    adapter_to_mask(tmp_path / "adapter", tmp_path / "mask", plain)
    mask_to_adapter(tmp_path / "mask", tmp_path / "bits", plain)  # no task: the class is noted
    bits = AutoPeftModel.from_pretrained(tmp_path / "bits")
    assert torch.equal(output_of(bits), output_of(model))
    status = bits.get_model_status()
    assert (status.peft_types, status.enabled) == ({"default": "MFT"}, True)


def test_the_mask_file_serves_the_engine(tmp_path):
    model = train(get_peft_model(tiny_llama(), MftConfig(layers="all", keep=0.7)))
    model.save_pretrained(tmp_path / "adapter")
    path = adapter_to_mask(tmp_path / "adapter", tmp_path, tiny_llama())
    base = tiny_llama()
    switch = MaskSwitch(base)
    switch.add("mine", path)
    with switch.using("mine"):
        assert torch.equal(output_of(base), output_of(model))
    assert load_mask(path).config["keep"] == 0.7
    MFT(tiny_llama(), mask=model.bitmask()).save_pretrained(tmp_path / "given")  # other settings
    mask_to_adapter(tmp_path / "given", tmp_path / "back", tiny_llama())
    back = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back")
    assert back.bitmask() == model.bitmask()


REFUSED = [
    ({"scope": "head", "target_modules": ["up_proj"]}, "attention's output projection"),
    ({"scope": "2:3", "keep": 2 / 3}, "not a multiple of 3"),
    ({"layers": [7]}, "model's layers are"),
    ({"target_modules": ["nowhere"]}, "matches no maskable weight"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "masked or trained"),
    ({"modules_to_save": ["clasifier"]}, "Correct the name"),
    ({"form": "bits"}, "no scores to train"),
    ({"base_sha256": "0" * 64}, "other base weights"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda one: str(one)[:30])
def test_wrong_use_is_refused_before_anything_changes(settings, words):
    model = tiny_llama()
    before, hooks = copied_state(model), hooks_of(model)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, MftConfig(**{"layers": "all"} | settings))
    assert same_state(model, before) and hooks_of(model) == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_more_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), MftConfig(layers="all"))
    for name, config, words in (
        ("steps", MftConfig(), "another name"),
        ("other", MftConfig(dropout=True), "Give dropout=False"),
        ("other", MftConfig(modules_to_save=["q_proj"], layers=[0]), "masked or trained"),
    ):
        with pytest.raises(ValueError, match=words):
            model.add_adapter(name, config)
    with pytest.raises(ValueError, match="on its PeftModel"):
        MFT(model.get_base_model())
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(ValueError, match="which masks cannot do"):
        model(TOKENS, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="Leave state_dict out"):
        inject_adapter_in_model(MftConfig(), tiny_llama(), state_dict={"a": torch.ones(1)})
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        get_peft_model(lora.get_base_model(), MftConfig(layers="all"))
    by_hand = tiny_llama()
    by_hand.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(ValueError, match="`forward` of its own"):
        get_peft_model(by_hand, MftConfig(layers="all"))
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="other base weights"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_hook_of_accelerate_sees_the_masked_layer():
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model, hooked = tiny_llama(), tiny_llama()
    add_hook_to_module(hooked.model.layers[1].mlp.up_proj, Doubling())
    config = {"layers": [1], "keep": 0.5}
    masked, both = (get_peft_model(one, MftConfig(**config)) for one in (model, hooked))
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, i, output: 2 * output)
    assert torch.equal(output_of(masked), output_of(both))
    alone = get_peft_model(tiny_llama(), MftConfig(**config))
    assert not torch.equal(output_of(both), output_of(alone))


def test_recomputed_activations_and_copies_give_the_same():
    config = MftConfig(layers="all", scope="global")
    plain, saving = (get_peft_model(tiny_llama().train(), config) for _ in range(2))
    saving.gradient_checkpointing_enable()
    saving.enable_input_require_grads()
    twin = copy.deepcopy(plain)
    for one in (plain, saving, twin):
        train(one)
    assert plain.bitmask() == saving.bitmask() == twin.bitmask()
    train(twin)
    assert plain.bitmask() == saving.bitmask() != twin.bitmask()


def test_a_compiled_model_gives_the_same():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), MftConfig(layers="all", keep=0.5))
    rows = torch.randn(2, 8)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(rows), model(rows))


def test_threads_share_a_model():
    model = get_peft_model(tiny_llama(), MftConfig(layers="all", scope="global"))
    expected, wrong = output_of(model), []

    def work():
        for _ in range(5):
            if not torch.equal(output_of(model), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and same_state(model.unload(), tiny_llama().state_dict())


OTHERS = """
import json, sys, tempfile, torch, warnings
warnings.filterwarnings("ignore")
from peft import LoraConfig, PeftModel, get_peft_model
sys.path.insert(0, ".")
from tests.models import tiny_llama
def run():
    torch.manual_seed(1)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    tokens = torch.arange(5, 19).reshape(2, 7)
    logits = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny_llama(), folder)
    assert torch.equal(again(tokens).logits, logits)
    merged = [one.merge_and_unload()(tokens).logits for one in (again, model)]
    assert torch.equal(*merged)
    return logits.sum(-1).tolist()
before = run()
import mft_nb.peft
assert run() == before
import importlib.util
found = importlib.util.find_spec
for name in [name for name in sys.modules if name.split(".")[0] in ("peft", "mft_nb")]:
    del sys.modules[name]
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else found(name, *rest)
try:
    import mft_nb.peft
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_other_methods_are_as_before_and_a_missing_peft_is_named():
    command = [sys.executable, "-c", OTHERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message = json.loads(done.stdout.splitlines()[-1])
    assert "needs peft, which is not installed" in message and "'.[peft]'" in message
