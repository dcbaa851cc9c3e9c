"""The named sets of real pictures: readable to the last one, and training never sees what is held for validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.readers import BadRows
from training.pictures import SETS, open_source, records_of, unseen_drawing

pytestmark = pytest.mark.data


@pytest.mark.parametrize("name", sorted(SETS))
def test_no_row_is_bad_and_splits_are_apart(data: Path, name: str) -> None:
    bad = BadRows(0)
    train, val = records_of(name, data, "train", bad), records_of(name, data, "val", bad)
    assert train
    assert not {record.image for record in train} & {record.image for record in val}
    assert all(SETS[name].captions(record) for record in train)
    assert SETS[name].license


def test_concepts_of_validation_are_in_no_training_caption_set(data: Path) -> None:
    bad = BadRows(0)
    train, val = records_of("emoji", data, "train", bad), records_of("emoji", data, "val", bad)
    assert not {record.meta["name"] for record in train} & {record.meta["name"] for record in val}


def test_a_source_holds_all_but_the_drawings_kept_back(data: Path) -> None:
    source, weight = open_source("usda", 16, BadRows(0), str(data))
    assert source.size() == len(records_of("usda", data, "train", BadRows(0)))
    assert weight == SETS["usda"].weight
    held = [record for record in records_of("emoji", data, "train", BadRows(0)) if unseen_drawing(record)]
    assert 200 < len(held) < 900
