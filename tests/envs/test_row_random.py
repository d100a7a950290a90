"""Random numbers for all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from envs.row_random import RowRandom, row_keys

CPU = torch.device("cpu")


def source(seeds: list[int], stream: int, dtype: torch.dtype = torch.float32) -> RowRandom:
    random = RowRandom(row_keys(seeds, CPU), dtype)
    random.begin(torch.full((len(seeds),), stream))
    return random


def test_the_generator_is_splitmix64():
    """Its published first numbers for the state 0."""
    random = RowRandom(torch.zeros(1, dtype=torch.int64), torch.float64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random._integers(3)[0].tolist() == [number >> 11 for number in expected]


def test_a_row_draws_what_it_would_draw_alone_and_goes_on_where_it_was():
    together, alone = source([3, 4, 5], stream=7), source([4], stream=7)
    first = together.uniform(-1.0, 1.0, 6)
    assert torch.equal(first[1:2], alone.uniform(-1.0, 1.0, 6))
    assert torch.equal(together.standard_normal(2)[1:2], alone.standard_normal(2))
    in_pieces = source([3, 4, 5], stream=7)
    assert torch.equal(first, torch.cat([in_pieces.uniform(-1.0, 1.0, size) for size in (1, 2, 3)], 1))
    assert not torch.equal(first, source([3, 4, 5], stream=8).uniform(-1.0, 1.0, 6))
    assert len({float(x) for x in first.flatten()}) == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_have_their_distribution(dtype):
    random, rows = source(list(range(200)), stream=1, dtype=dtype), 200
    drawn = random.uniform((0.0, -3.0), (1.0, 5.0), 2).numpy()
    assert drawn.dtype == torch.empty(0, dtype=dtype).numpy().dtype
    assert drawn[:, 1].min() >= -3.0
    assert drawn[:, 1].max() < 5.0
    many = random.uniform(0.0, 1.0, 500).numpy().ravel()
    assert many.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * many.size))
    assert np.abs(np.histogram(many, 20, (0, 1))[0] - many.size / 20).max() < 5 * np.sqrt(many.size / 20)
    normal = random.standard_normal(500).numpy().astype(np.float64)
    assert np.isfinite(normal).all()
    assert normal.mean() == pytest.approx(0.0, abs=5 / np.sqrt(normal.size))
    assert normal.var() == pytest.approx(1.0, abs=5 * np.sqrt(2 / normal.size))
    assert (normal**4).mean() == pytest.approx(3.0, abs=0.25)
    neighbours = np.corrcoef(normal[:-1].ravel(), normal[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(normal.size)
    counts = np.bincount(random.randint(4, 500).numpy().ravel(), minlength=4)
    assert np.abs(counts - rows * 125).max() < 5 * np.sqrt(rows * 125)
