"""Tiny models, and what they must give under a mask: found without the engine."""

import copy
import math

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from mft_nb.bitmask import BitMask, random_mask
from mft_nb.mask import MaskConfig
from mft_nb.switch import MaskSwitch
from mft_nb.targets import maskable_weights

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
SIZES |= {"initializer_range": 0.3}  # gradients large enough for a few steps of SGD


def bert(**more):
    """A classifier with random weights, the same each time."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, num_attention_heads=2, **(SIZES | more))
    return BertForSequenceClassification(config).eval()


class Stack(nn.Module):
    """Three linear layers that return a tensor."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, inputs):
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def batch(rows=6):
    """Token ids and labels."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 50, (rows, 7), generator=draw)
    return {"input_ids": tokens, "labels": torch.randint(0, 2, (rows,), generator=draw)}


def config(**more):
    """A mask on all layers that keeps 80 %."""
    return MaskConfig(**({"layers": "all", "keep": 0.8, "init": "normal"} | more))


def logits(model):
    """Of the batch, without gradients."""
    with torch.no_grad():
        return model(**batch()).logits


def by_hand(model, mask):
    """A copy of a plain model whose weights are 0 where a mask prunes."""
    model = copy.deepcopy(model)
    for name, kept in mask.items():
        model.get_parameter(name).data[~kept] = 0
    return model


def winners(scores, keep=0.8):
    """The mask of each matrix by a stable sort: the largest scores, of equal ones the first."""
    found = {}
    for name, score in scores.items():
        values = score.detach().numpy().reshape(-1)
        pruned = math.floor(round((1 - keep) * len(values), 6) + 0.5)
        mask = np.zeros(len(values), dtype=bool)
        mask[np.argsort(-values, kind="stable")[: len(values) - pruned]] = True
        found[name] = torch.from_numpy(mask).view(score.shape)
    return BitMask(found)


def of_scores(mft, keep=0.8):
    """The mask that the present scores of an MFT with the scope "tensor" ask for."""
    return winners(dict(zip(mft.base_weights(), mft.scores, strict=True)), keep)


def state(model):
    """Copies of all parameters and buffers, as bytes."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {n: t.detach().clone().reshape(-1).view(torch.uint8) for n, t in tensors.items()}


def same(first, second):
    """Whether two states are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def steps(mft, count=3, rate=1.0, model=None, rows=None):
    """Some steps of SGD on the batch, or on other rows."""
    model = model or mft.model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(count):
        optimizer.zero_grad()
        model(**(rows or batch())).loss.backward()
        optimizer.step()


def switch():
    """A model, a switch with the masks a and b on it, and the logits under each."""
    model, answers = bert(), {None: logits(bert())}
    masks = MaskSwitch(model)
    for seed, name in enumerate("ab"):
        mask = random_mask(maskable_weights(model, layers="all"), 0.5, seed=seed)
        masks.add(name, mask)
        answers[name] = logits(by_hand(bert(), mask))
    return model, masks, answers


def uses(mft, folder):
    """Each use of a mask: a forward pass, its bits, taking it off, merging, saving."""
    return [
        lambda: mft.model(**batch()),
        mft.bitmask,
        mft.unload,
        mft.merge_and_unload,
        lambda: mft.save_pretrained(folder),
    ]
