"""Tiny models with random weights, rows for them, and plain ways to train a mask on them."""

import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from mft_nb.bitmask import top_k_mask
from mft_nb.mask import MaskConfig

CONFIG = MaskConfig(layers="all", init="normal", keep=0.8)


def tiny_bert(dropout=0.0, **sizes):
    """A classifier, the same in each call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    shape |= {"vocab_size": 50, "num_hidden_layers": 3, "num_labels": 2}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**shape | rates | sizes)).eval()


def tiny_llama(**sizes):
    """A language model, the same in each call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape | heads | sizes)).eval()


def tiny_bart(**sizes):
    """A classifier with two stacks of layers, the same in each call."""
    torch.manual_seed(0)
    shape = {"d_model": 24, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_labels": 2}
    shape |= {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 50}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**shape | {"max_position_embeddings": 32} | sizes)
    return BartForSequenceClassification(config).eval()


def tiny_gpt2_config():
    """Sizes of a GPT-2, whose Conv1D layers have the shape (in, out)."""
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
    return GPT2Config(vocab_size=50, pad_token_id=0, **sizes)


def batch(rows=6, seed=1):
    """Token ids and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(5, 50, (rows, 7), generator=generator),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }


class Rows(torch.utils.data.Dataset):
    """Rows for transformers.Trainer."""

    def __init__(self, count=48):
        self.rows = batch(count, seed=3)

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.rows.items()}


def expected(mft):
    """The mask that the present scores ask for, found by a plain search."""
    ranked = dict(zip(mft.base_weights(), mft.scores, strict=True))
    return top_k_mask(ranked, mft.config.keep, mft.config.scope)


def train_steps(mft, steps=3, model=None, accumulate=1, context=None, optimizer=None):
    """Some steps of AdamW in plain PyTorch, each on the same six rows."""
    optimizer = optimizer or torch.optim.AdamW(mft.trainable, lr=0.02, weight_decay=0)
    inputs = batch()
    for _ in range(steps):
        for part in range(accumulate):
            size = 6 // accumulate
            rows = {k: v[part * size : (part + 1) * size] for k, v in inputs.items()}
            with context or torch.enable_grad():
                loss = (mft.model if model is None else model)(**rows).loss / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(first, second):
    """Fraction of the bits in which two masks differ."""
    return (first ^ second).kept / first.total


def same_state(model, before):
    """Whether a model has the names and values of an earlier state, in that order."""
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[n], t) for n, t in before.items())


def copied_state(model):
    """A model's state, for `same_state`."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trainer_for(model, folder, kind=None, rows=None, callbacks=(), **options):
    """A Trainer of transformers with nothing but a model."""
    from transformers import Trainer, TrainingArguments  # takes long; two_processes needs none

    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 0.02}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    return (kind or Trainer)(
        model=model, args=arguments, train_dataset=rows or Rows(), callbacks=list(callbacks)
    )
