"""A mask file is small, gives back the mask that was saved, and is refused when damaged."""

import json
import math
import random
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from safetensors.torch import save
from torch import nn

from mft_nb import mask_file
from mft_nb.bitmask import BitMask, random_mask
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from mft_nb.mask_file import decode_mask, encode_mask, load_mask, mask_sha256, save_mask
from mft_nb.sharded import weights_sha256

BASE = "0" * 64  # the hash of any base; also what a file has as its digest at first
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def drawn(shape, density, seed=0):
    """A random mask of that density, exactly 0 or 1 at the ends."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def runs(length, seed):
    """A mask of long runs, as when whole rows are pruned."""
    generator = random.Random(seed)
    parts = []
    while sum(map(len, parts)) < length:
        parts.append(torch.full((generator.choice([1, 2, 254, 255, 256, 700]),), len(parts) % 2))
    return torch.cat(parts)[:length].bool()


words = some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
names = some.lists(words, min_size=1, max_size=4).map(".".join)
shapes = some.lists(some.integers(0, 40), min_size=0, max_size=3).map(tuple)
densities = some.sampled_from([0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1])
tensors = some.builds(drawn, shapes, densities, some.integers(0, 99)) | some.builds(
    runs, some.integers(1, 3000), some.integers(0, 99)
)
masks = some.dictionaries(names, tensors, min_size=1, max_size=4).map(BitMask)


@SETTINGS
@given(mask=masks)
def test_what_is_loaded_is_what_was_saved(mask, tmp_path):
    told = {"config": {"sha256": BASE, "note": "é\n"}, "training": {"seed": 3}, "rest": {"é": "0"}}
    path = save_mask(mask, tmp_path / "mask.safetensors", BASE, **told)
    saved = load_mask(path)
    assert saved.mask == mask
    assert {name: one.shape for name, one in saved.mask.items()} == {
        name: one.shape for name, one in mask.items()
    }
    assert {name: getattr(saved, name) for name in told} == told
    assert saved.base_sha256 == BASE
    assert list(tmp_path.iterdir()) == [path]


@SETTINGS
@given(mask=tensors)
def test_no_matrix_takes_more_than_its_bits_and_a_byte(mask):
    assert len(encode_mask(mask)) <= 1 + math.ceil(mask.numel() / 8)


@SETTINGS
@given(payload=some.binary(max_size=40), shape=some.lists(some.integers(0, 2**40), max_size=3))
def test_any_payload_gives_a_mask_of_the_shape_or_a_ValueError(payload, shape):
    try:
        mask = decode_mask(payload, tuple(shape))
    except ValueError:
        return
    assert mask.shape == tuple(shape)


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(1)
    shapes = {"layer.0.up.weight": (48, 16), "layer.0.down.weight": (16, 48), "é.weight": (5,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """The bytes of three files: a tenth pruned, half pruned, nine tenths pruned."""
    folder = tmp_path_factory.mktemp("files")
    contents = []
    for keep in (0.9, 0.5, 0.1):
        mask = random_mask(weights, keep)
        path = save_mask(mask, folder / f"{keep}", weights_sha256(weights), {"keep": keep})
        contents.append(path.read_bytes())
    return contents


def refusal(content, path, weights=None):
    """The sentence with which a file is refused; only a ValueError may come."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_mask(path, weights)
    return str(caught.value)


def test_a_file_that_ends_too_soon_is_refused(files, tmp_path):
    for content in files:
        header = 8 + int.from_bytes(content[:8], "little")
        lengths = {*range(0, 40), *range(0, len(content), 13), header - 1, header, header + 1}
        for length in {*lengths, len(content) - 1}:
            sentence = refusal(content[:length], tmp_path / "mask")
            assert "cut off" in sentence, length
        assert "damaged" in refusal(content + b"\0", tmp_path / "mask")


def test_any_flipped_bit_is_refused(files, tmp_path):
    content = files[0]
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        refusal(bytes(flipped), tmp_path / "mask")
    for bit in range(8 * 100):  # every bit of the header's beginning
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        refusal(bytes(flipped), tmp_path / "mask")


def test_a_file_put_together_from_two_is_refused(files, tmp_path):
    for first in files:
        for second in files:
            if first is not second:
                header = 8 + int.from_bytes(first[:8], "little")
                body = 8 + int.from_bytes(second[:8], "little")
                refusal(first[:header] + second[body:], tmp_path / "mask")
                refusal(first[: header + 20] + second[body + 20 :], tmp_path / "mask")


def test_noise_is_refused(tmp_path):
    generator = random.Random(0)
    for length in (0, 1, 7, 8, 9, 64, 500):
        for _ in range(20):
            refusal(generator.randbytes(length), tmp_path / "mask")
    nested = b"[" * 200_000
    refusal(len(nested).to_bytes(8, "little") + nested, tmp_path / "mask")
    refusal((2**63).to_bytes(8, "little") + b"{}", tmp_path / "mask")


def test_other_weights_shapes_and_names_are_refused(files, weights, tmp_path):
    path = tmp_path / "mask"
    path.write_bytes(files[0])
    load_mask(path, weights)
    load_mask(path, weights | {"more": torch.ones(1)})
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed["layer.0.up.weight"][3, 4] += 1e-6
    assert "other base weights" in refusal(files[0], path, changed)
    half = {name: weight.half() for name, weight in weights.items()}
    assert "other base weights" in refusal(files[0], path, half)
    transposed = weights | {"layer.0.up.weight": torch.ones(16, 48)}
    assert "has shape (48, 16)" in refusal(files[0], path, transposed)
    assert "is not there" in refusal(files[0], path, {"other": torch.ones(1)})


def test_files_of_other_kinds_and_folders_are_refused(files, tmp_path):
    path = tmp_path / "mask"
    assert "not a mask file" in refusal(save({"w": torch.ones(2)}), path)
    assert "not a mask file" in refusal(save({"w": torch.ones(2)}, {"format": "pt"}), path)
    older = save({"w": torch.ones(2, dtype=torch.uint8)}, {"format": "mft_nb.bitmask/1"})
    assert "Save the mask again" in refusal(older, path)
    newer = files[0].replace(b"mft_nb.bitmask/2", b"mft_nb.bitmask/9")
    assert "newer mft_nb" in refusal(newer, path)
    with pytest.raises(ValueError, match="is a folder"):
        load_mask(tmp_path)
    with pytest.raises(FileNotFoundError, match="No mask file"):
        load_mask(tmp_path / "nothing")


def forged(payload, **changes):
    """A file whose hash is right but whose metadata lies."""
    mask = BitMask({"w": torch.ones(10, dtype=torch.bool)})
    entries = json.loads(mask_file._describe(mask, BASE, {"config": {}})) | changes
    tensor = {"w": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}
    data = save(tensor, {"mft_nb": json.dumps(entries)})
    digest = mask_file.hashlib.sha256(data).hexdigest()
    return data.replace(BASE.encode(), digest.encode(), 1)


def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path):
    payload = encode_mask(torch.ones(10, dtype=torch.bool))
    (tmp_path / "mask").write_bytes(forged(payload))
    load_mask(tmp_path / "mask")  # without a lie it is a mask file
    huge = [10**6, 10**6]
    lies = [
        {"tensors": {"w": {"shape": huge, "kept": 10**12}}},
        {"tensors": {"w": {"shape": [2**62, 2**62], "kept": 1}}},
        {"tensors": {"w": {"shape": [0, 2**62, 2**62], "kept": 0}}},
        {"tensors": {"w": {"shape": [-10], "kept": 0}}},
        {"tensors": {"w": {"shape": [10.0], "kept": 10}}},
        {"tensors": {"w": {"shape": [10], "kept": 11}}},
        {"tensors": {"w": {"shape": [10], "kept": 9}}},
        {"tensors": {"w": {"shape": [11], "kept": 10}}},
        {"tensors": {"w": [10]}},
        {"tensors": {"v": {"shape": [10], "kept": 10}}},
        {"tensors": {}},
        {"tensors": None},
        {"mask_sha256": BASE},
        {"mask_sha256": 7},
        {"base_sha256": "none"},
        {"config": []},
        {"versions": None},
        {"training": []},
        {"rest": None},
    ]
    tracemalloc.start()
    for lie in lies:
        refusal(forged(payload, **lie), tmp_path / "mask")
        refusal(forged(bytes([0]) + payload[1:], **lie), tmp_path / "mask")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "mask.safetensors"
    save_mask(BitMask({"w": drawn((20, 20), 0.5)}), path, BASE)
    before = path.read_bytes()

    def half_written(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError, match="no space"):
        save_mask(BitMask({"w": drawn((20, 20), 0.9)}), path, BASE)
    with pytest.raises(TypeError):
        save_mask(BitMask({"w": drawn((20, 20), 0.9)}), path, BASE, {"not": object()})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("density", [0, 0.001, 0.1, 0.5, 0.9, 0.999, 1])
def test_a_file_is_at_most_packed_bits_and_one_percent(density, tmp_path):
    matrices = {
        f"bert.encoder.layer.{i}.output.weight": drawn((768, 768), density, i) for i in (4, 5)
    }
    path = save_mask(BitMask(matrices), tmp_path / "mask", BASE, {"keep": density})
    assert path.stat().st_size <= 1.01 * 2 * 768 * 768 / 8
    assert load_mask(path).mask == BitMask(matrices)


def test_a_file_is_the_same_whatever_device_torch_was_built_for(tmp_path, monkeypatch):
    for local in ("", "+cpu", "+cu130.with-a-long-name"):
        monkeypatch.setattr("torch.__version__", f"2.9.0{local}")
        mask = BitMask({"weight": drawn((8, 8), 0.9)})
        save_mask(mask, tmp_path / f"mask{local}.safetensors", BASE, MaskConfig().to_dict())
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_four_layers_of_bert_base_come_within_3_percent_of_the_entropy(tmp_path):
    layer = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    shapes = {
        f"bert.encoder.layer.{i}.{j}.weight": s for i in range(4) for j, s in enumerate(layer)
    }
    p = 0.1
    mask = BitMask({name: drawn(shape, 1 - p, i) for i, (name, shape) in enumerate(shapes.items())})
    assert mask.total == 28_311_552
    bound = -mask.total * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    path = save_mask(mask, tmp_path / "mask", BASE, {})
    assert path.stat().st_size <= 1.03 * bound
    assert mask_sha256(load_mask(path).mask) == mask_sha256(mask)


EARLIER = Path(__file__).parent / "data" / "earlier_mask"  # written before there was a TrainConfig
EARLIER_MASK = {
    "layers.0.weight": [[1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 1, 1]],
    "layers.1.weight": [[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]],
}
EARLIER_CONFIG = {  # with init, init_scale and init_seed, which that code called otherwise
    "layers": "all",
    "keep": 0.75,
    "modules_to_save": ["head"],
    "init": "normal",
    "init_scale": 0.5,
    "init_seed": 7,
}
EARLIER_TRAINING = {
    "optimizer": "adafactor",
    "learning_rate": 0.02,
    "epochs": 3,
    "batch_size": 16,
    "max_length": 64,
    "precision": "float32",
    "warmup_steps": 0,
    "warmup_ratio": 0.1,
    "max_grad_norm": 0.0,
}


def earlier_model():
    """The model that the earlier file's mask was made for: eighths from -3/8 on in each weight."""
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 2)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) - 3) / 8)
    return model


def test_a_file_of_the_earlier_code_loads():
    model = earlier_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = BitMask({name: torch.tensor(bits).bool() for name, bits in EARLIER_MASK.items()})
    saved = load_mask(EARLIER / "mask.safetensors", base)
    assert saved.mask == expected
    assert saved.training == {} and saved.rest == {}
    assert saved.config["start_seed"] == 7 and saved.config["epochs"] == 3  # as they were written
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has no digests of the rest that could differ
        mft = MFT.from_pretrained(model, EARLIER)
    assert mft.bitmask() == expected
    assert mft.trained_with == EARLIER_TRAINING
    new = MaskConfig().to_dict()
    renamed = {name: value for name, value in mft.config.to_dict().items() if value != new[name]}
    assert renamed.pop("exclude_modules") == [
        *("embed", "pooler", "classifier", "score", "lm_head", "pre_classifier"),
    ]
    assert renamed == EARLIER_CONFIG
    for name, kept in expected.items():
        assert torch.equal(model.get_parameter(name), base[name] * kept)
    assert (model["head"].weight == 1.5).all() and (model["head"].bias == -2).all()
    mft.unload()
    assert all(torch.equal(base[name], one) for name, one in model.state_dict().items())


def test_a_file_of_the_earlier_code_is_checked_like_any_other(tmp_path):
    other = earlier_model()
    with torch.no_grad():
        other.layers[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="other base weights"):
        MFT.from_pretrained(other, EARLIER)
    content = (EARLIER / "mask.safetensors").read_bytes()
    assert "damaged" in refusal(content.replace(b"start_seed", b"start_sead"), tmp_path / "mask")
    (tmp_path / "mask.safetensors").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="modules were trained with it"):
        MFT.from_pretrained(earlier_model(), tmp_path)


def test_a_file_of_the_earlier_code_saved_again_has_the_names_of_today(tmp_path):
    again = MFT.from_pretrained(earlier_model(), EARLIER).save_pretrained(tmp_path)
    saved = load_mask(again)
    assert saved.training == EARLIER_TRAINING
    assert saved.config.items() >= EARLIER_CONFIG.items()
    assert not {"start", "spread", "start_seed", *EARLIER_TRAINING} & set(saved.config)
    assert saved.mask == load_mask(EARLIER / "mask.safetensors").mask
    model = earlier_model()
    MFT.from_pretrained(model, tmp_path)
    assert (model["head"].weight == 1.5).all()
