"""Mask training under FSDP; started twice by test_fsdp, with a folder and the rank.

Each process leaves a file `rank-N.pt`: by name of a trial its masks and numbers, or what was said.
"""

import os
import sys
import warnings

import torch
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from mft_nb.applied import AppliedMask
from mft_nb.bitmask import random_mask
from mft_nb.mask import MFT
from mft_nb.switch import MaskSwitch
from mft_nb.targets import maskable_weights
from tests.strangers import batch, bert, config, logits, steps

SCOPES = ("tensor", "global", "layer", "neuron", "2:4")
SCHEDULE = {"keep": 0.5, "schedule": [(0, 1.0), (3, 0.5)]}


def settings(scope):
    """Of a mask with some scope."""
    return config(scope=scope, keep=0.5)


def sharded(model, **more):
    """The model, each layer and the rest in pieces on all processes."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def own_rows():
    """This process's part of the batch."""
    size = 6 // dist.get_world_size()
    start = dist.get_rank() * size
    return {name: rows[start : start + size] for name, rows in batch().items()}


def masked(settings, train=True):
    """A sharded model with scores on it."""
    mft = MFT(bert(), settings)
    sharded(mft.model)
    if train:
        steps(mft, rows=own_rows())
    return mft


def trained(scope, folder):
    """The mask, and that of the file that both processes write and read."""
    mft = masked(settings(scope))
    mask = mft.bitmask()
    given = logits(mft.model)
    mft.save_pretrained(folder / scope.replace(":", "-"))
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MFT.from_pretrained(bert(), folder / scope.replace(":", "-"))
    off = (logits(loaded.model) - given).abs().max().item()
    return dict(mask), dict(loaded.bitmask()), off


def head_trained(folder):
    """A head that is trained with the mask, in the file and back."""
    mft = masked(config(modules_to_save=("classifier",)))
    given = logits(mft.model)
    mft.save_pretrained(folder / "head")
    dist.barrier()
    loaded = MFT.from_pretrained(bert(), folder / "head").model
    moved = (loaded.classifier.weight - bert().classifier.weight).abs().max().item()
    return (logits(loaded) - given).abs().max().item(), moved


def scheduled():
    """The densities before each step and after the last."""
    mft, densities = masked(config(**SCHEDULE), train=False), []
    for _ in range(4):
        densities.append(round(mft.bitmask().density, 3))
        steps(mft, 1, rows=own_rows())
    return [*densities, round(mft.bitmask().density, 3)]


def with_penalty():
    """A step whose loss has the penalty."""
    mft = masked(config(l1=0.01), train=False)
    mft.model.train()
    steps(mft, 1, rows=own_rows())
    return dict(mft.bitmask())


def uneven(init):
    """Equal or unequal scores, on pieces of 13 and 12 rows."""
    mft = MFT(bert(intermediate_size=25), config(init=init, scope="global"))
    sharded(mft.model)
    return dict(mft.bitmask())


def spoilt():
    """One score of one process is NaN."""
    mft = masked(config(), train=False)
    if dist.get_rank():
        mft.scores[0].data.to_local()[0, 0] = float("nan")
    return mft.bitmask()


def rounded():
    """Bits that forward in bfloat16 has otherwise than the mask."""
    mft, other = MFT(bert(), config()), []
    mask = mft.bitmask()
    sharded(mft.model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for name, kept in mask.items():
        module = mft.model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(
            lambda own, *_, kept=kept: other.append(int(((own.weight != 0) != kept).sum()))
        )
    logits(mft.model)
    return sum(other)


def finished(put_on):
    """A finished mask on a model that is in pieces."""
    model = bert()
    mask = random_mask(maskable_weights(model, layers="all"), 0.5)
    return put_on(sharded(model), mask)


def switch_on(model, mask):
    masks = MaskSwitch(model)
    masks.add("a", mask)
    masks.use("a")


def older():
    """FSDP1 around a masked model: the mask within and outside of `summon_full_params`."""
    mft = MFT(bert(), settings("tensor"))
    model = FullyShardedDataParallel(
        mft.model, use_orig_params=True, device_id=torch.device("cpu")
    )
    steps(mft, model=model, rows=own_rows())
    with FullyShardedDataParallel.summon_full_params(model):
        mask = dict(mft.bitmask())
    return mask, said(mft.bitmask), said(lambda: mft.save_pretrained("nowhere"))


def said(trial):
    """What a trial gives, or its error in words."""
    try:
        return trial()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_trials(folder, rank):
    """All trials, in the same order on each process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {scope: said(lambda scope=scope: trained(scope, folder)) for scope in SCOPES}
    found["head"] = said(lambda: head_trained(folder))
    found["schedule"] = said(scheduled)
    found["penalty"] = said(with_penalty)
    mft = masked(config(), train=False)
    found["unload"], found["merge"] = said(mft.unload), said(mft.merge_and_unload)
    found["after"] = mft.bitmask().density
    found["first"] = said(lambda: MFT(sharded(bert()), config()) and "taken")
    found["older"] = said(older)
    found["uneven"] = {init: said(lambda init=init: uneven(init)) for init in ("ones", "normal")}
    found["spoilt"], found["rounded"] = said(spoilt), said(rounded)
    found["applied"] = said(lambda: finished(AppliedMask))
    found["switch"] = said(lambda: finished(switch_on))
    found["save_model"] = said(lambda: masked(config(), train=False).save_model(folder / "no"))
    torch.save(found, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what FSDP leaves behind need not be torn down
