"""Ranks by hand (shared/specs/nap-and-plasticity.md, sections 4.2 and 7.21)."""

from __future__ import annotations

import pytest
import torch

from plasticity.measures import ranks

BY_SIGMA = (ranks.erank, ranks.srank, ranks.energy_rank, ranks.stable_rank, ranks.participation)


def test_hand_values():
    sigma = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    values = [float(function(sigma)) for function in BY_SIGMA]
    assert values == pytest.approx([2.7495, 3, 3, 1.5556, 2.0], abs=1e-4)
    assert ranks.feature_rank(sigma, samples=100, epsilon=0.15).tolist() == [2]


def test_zero_matrix_has_rank_zero():
    sigma = ranks.singular_values(torch.zeros(2, 6, 3))
    assert [function(sigma).tolist() for function in BY_SIGMA] == [[0, 0]] * 5
    assert ranks.feature_rank(sigma, 6).tolist() == [0, 0]
    assert ranks.weight_rank(torch.zeros(2, 6, 3)).tolist() == [0, 0]


def test_rank_one_matrix_has_rank_one():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 40, 1, generator=generator) * torch.randn(1, 1, 10, generator=generator)
    sigma = ranks.singular_values(matrix)
    for function in BY_SIGMA:
        assert float(function(sigma)) == pytest.approx(1, abs=1e-5)  # the product is rounded to float32
    assert ranks.feature_rank(sigma, 40).tolist() == [1]


def test_orthonormal_columns_have_full_rank():
    columns = torch.linalg.qr(torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0)).double())[0]
    sigma = ranks.singular_values(columns)
    for function in BY_SIGMA:
        assert float(function(sigma)) == pytest.approx(8, abs=1e-9)


def test_srank_of_everything_is_the_number_of_values():
    sigma = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).sort(1, descending=True).values
    assert (ranks.srank(sigma, 0.0) <= 50).all()


def test_members_do_not_mix():
    matrices = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    matrices[1] *= 1e6
    matrices[2, :, 1:] = 0
    sigma = ranks.singular_values(matrices)
    assert sigma.dtype == torch.float64
    for function in BY_SIGMA:
        alone = torch.cat([function(ranks.singular_values(m.unsqueeze(0))) for m in matrices])
        torch.testing.assert_close(function(sigma), alone)
    assert ranks.srank(sigma)[2] == 1


def test_feature_matrix_of_a_convolution_keeps_evenly_spaced_positions():
    h = torch.arange(2 * 3 * 4 * 5 * 5, dtype=torch.float32).view(2, 3, 4, 5, 5)
    whole = ranks.feature_matrix(h)
    assert whole.shape == (2, 75, 4)
    assert torch.equal(whole[1, 26], h[1, 1, :, 0, 1])
    assert torch.equal(ranks.feature_matrix(h, rows=20), whole[:, ::4])
    assert ranks.feature_matrix(h[..., 0, 0]).shape == (2, 3, 4)


def test_weight_rank_of_a_convolution():
    weight = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = weight[0, 2]
    assert ranks.weight_rank(weight).tolist() == [0.75]


def test_a_member_that_is_not_finite_leaves_the_others_their_ranks():
    matrices = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    whole = ranks.singular_values(matrices)
    matrices[1, 3, 2] = torch.inf
    sigma = ranks.singular_values(matrices)
    assert torch.equal(sigma[::2], whole[::2])
    for rank in (ranks.erank, ranks.srank, ranks.energy_rank, ranks.stable_rank, ranks.participation):
        found = rank(sigma)
        assert found.isnan().tolist() == [False, True, False]
        assert torch.equal(found[::2], rank(whole)[::2])
    assert ranks.feature_rank(sigma, 20).isnan().tolist() == [False, True, False]
    assert ranks.weight_rank(matrices).isnan().tolist() == [False, True, False]
