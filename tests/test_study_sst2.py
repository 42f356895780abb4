"""The real SST-2, where at hand: MFT_SST2_DIR, or ../shared/sst2 beside the project."""

import os
from pathlib import Path

import pytest

from mft_nb.study.datasets import fingerprint, leak, load_sst2

NEXT_TO_IT = Path(__file__).resolve().parent.parent.parent / "shared" / "sst2"
FOLDER = Path(os.environ.get("MFT_SST2_DIR") or NEXT_TO_IT)


@pytest.fixture(scope="module")
def sst2():
    if not (FOLDER / "train.tsv").exists():
        pytest.skip(
            "SST-2's files are not at hand: set MFT_SST2_DIR to a folder with train.tsv and dev.tsv"
        )
    return load_sst2(FOLDER)


def test_dev_is_the_test_split(sst2):
    assert len(sst2["test"]) == 872
    assert sum(sst2["test"]["label"]) == 444


def test_no_phrase_of_a_validation_sentence_is_in_train(sst2):
    train, validation = sst2["train"].to_pandas(), sst2["validation"].to_pandas()
    assert leak(train, validation) == 0.0
    assert len(validation) == 1000
    mixed = sst2["train"].shuffle(seed=0).to_pandas()
    assert leak(mixed[1000:], mixed[:1000]) > 0.9


def test_the_split_is_always_the_same(sst2):
    assert fingerprint(sst2) == fingerprint(load_sst2(FOLDER))
