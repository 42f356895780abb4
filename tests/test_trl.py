"""TRL's trainers take a mask where they take a LoRA."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mft_nb.mask import MFT
from mft_nb.peft import MftConfig, adapter_to_mask
from tests.models import copied_state, tiny_llama

pytest.importorskip("trl", reason="TRL comes with the extra `dev`")
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WORDS = ["<pad>", "<eos>", "<unk>", *"one two three four five six seven is more than less".split()]


@pytest.fixture(scope="module")
def tokenizer():
    """Of a dozen words."""
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **marks)


def settings(kind, folder, **options):
    """The smallest run of a trainer."""
    plain = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    plain |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    plain |= {"save_strategy": "no", "max_length": 16, "gradient_checkpointing": False}
    return kind(output_dir=str(folder), **plain | options)


PROMPTS = [f"{a} is more than" for a in WORDS[4:8]] * 2
PAIRS = {"prompt": PROMPTS, "chosen": [" one"] * 8, "rejected": [" seven"] * 8}
TOKENS = torch.arange(3, 13).reshape(2, 5)


def test_sft_trains_a_mask_and_saves_it(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": [f"{prompt} one" for prompt in PROMPTS]})
    model, before = tiny_llama(), copied_state(tiny_llama())
    trainer = SFTTrainer(
        model,
        settings(SFTConfig, tmp_path / "run", save_strategy="steps", save_steps=2),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=MftConfig(layers="all", keep=0.8, task_type="CAUSAL_LM"),
    )
    start = trainer.model.bitmask()
    trainer.train()
    mask = trainer.model.bitmask()
    assert mask != start and mask.density == pytest.approx(0.8, abs=0.001)
    held = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in held and "model.safetensors" not in held
    trainer.save_model(tmp_path / "adapter")
    trainer.model.eval()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, trainer.model(TOKENS).logits)
    adapter_to_mask(tmp_path / "adapter", tmp_path / "mask", tiny_llama())
    assert MFT.from_pretrained(tiny_llama(), tmp_path / "mask").bitmask() == mask
    plain = trainer.model.unload()
    assert all(torch.equal(plain.state_dict()[name], one) for name, one in before.items())


def log_probabilities(model, inputs):
    """Of each completion: the sum over its tokens, by plain means."""
    keys = ("input_ids", "attention_mask")
    with torch.no_grad():
        logits = model(**{key: inputs[key] for key in keys}).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (chosen * inputs["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("given", ["a config", "a model with a trained mask"])
def test_dpo_compares_the_mask_with_its_reference(given, tokenizer, tmp_path):
    config = MftConfig(layers="all", keep=0.8, task_type="CAUSAL_LM")
    model, reference = tiny_llama(), tiny_llama()
    if given != "a config":  # TRL's reference is then a frozen copy of the mask
        model, reference = (get_peft_model(one, config) for one in (model, reference))
        for one in (model, reference):
            for number, scores in enumerate(p for p in one.parameters() if p.requires_grad):
                scores.data += torch.randn(scores.shape, generator=torch.manual_seed(number)) / 50
        reference = reference.merge_and_unload()
    trainer = DPOTrainer(
        model,
        args=settings(DPOConfig, tmp_path),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
        peft_config=config if given == "a config" else None,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = log_probabilities(reference, inputs)
    start = trainer.model.bitmask("default")
    trainer.train()
    assert trainer.model.bitmask("default") != start
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    policy = log_probabilities(trainer.model.eval(), inputs)
    assert (policy - expected).abs().min() > 0.01  # three steps have moved the policy away from it
    chosen, rejected = (policy - expected).chunk(2)
    assert (chosen > rejected).all()
