"""The short form of `make fuzz-decoding`: mutations of good files and bodies, each decoded or refused in words."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz_decoding import one, samples

ROUNDS = 100


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of what it reads
@pytest.mark.parametrize("place", range(len(samples())))
def test_mutations(place: int) -> None:
    sample = samples()[place]
    one(sample)
    rng = np.random.default_rng(place)
    for _ in range(ROUNDS):
        data = bytearray(sample)
        match rng.integers(4):
            case 0:
                del data[rng.integers(1, len(data)) :]
            case 1:
                for at in rng.integers(1, len(data), 8):
                    data[at] = rng.integers(256)
            case 2:
                at = rng.integers(1, len(data))
                data[at:at] = rng.bytes(rng.integers(1, 40))
            case _:
                start, stop = sorted(rng.integers(1, len(data), 2))
                del data[start:stop]
        one(bytes(data))
