"""Masks of units against layers small enough to read."""

from __future__ import annotations

import pytest
import torch

from plasticity.measures import activity


def constant(values, batch=4):
    """A layer that does the same on every sample, [1, B, H]."""
    return torch.tensor(values).expand(1, batch, -1)


def test_dormant_units_by_hand():
    """Scores 3.137, 0.784, 0.0784 and 0 of the mean."""
    h = constant([4.0, 1.0, 0.1, 0.0])
    scores = activity.normalised_scores(activity.activity(h))
    torch.testing.assert_close(scores, torch.tensor([[3.137255, 0.784314, 0.0784314, 0.0]]))
    for tau, count in ((0.0, 1), (0.025, 1), (0.1, 2), (0.8, 3)):
        assert activity.dormant(h, tau).sum().tolist() == count


def test_a_layer_of_zeros_is_all_dormant_and_nothing_is_nan():
    h = torch.zeros(2, 3, 5)
    assert activity.dormant(h, 0.0).all()
    assert activity.dead(h, "relu").all()
    assert not activity.duplicate(h).any()
    assert activity.zero_fraction(h).tolist() == [1, 1]
    assert not activity.normalised_scores(activity.activity(h)).isnan().any()


def test_fraction_counts_units_not_layers():
    """1 of 2 and 0 of 8 units: 1 of 10, not a quarter."""
    narrow, wide = torch.tensor([[True, False]]), torch.zeros(1, 8, dtype=torch.bool)
    assert activity.fraction([narrow, wide]).tolist() == pytest.approx([0.1])


def test_negative_activations_count_by_magnitude():
    h = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert activity.dormant(h, 0.5).tolist() == [[False, True]]


def test_units_of_a_convolution_are_channels():
    h = torch.zeros(1, 2, 3, 4, 4)
    h[0, 1, 0, 2, 2] = 1  # one position of one sample
    h[0, :, 1] = 5
    assert activity.dead(h, "relu").tolist() == [[False, False, True]]
    assert activity.dormant(h, 0.025).tolist() == [[True, False, True]]  # 1 / 32 against a mean of 1.68
    assert activity.rarely(h, 0.05).tolist() == [[True, False, True]]
    assert activity.rarely(h, 0.03).tolist() == [[False, False, True]]
    assert activity.zero_fraction(h).tolist() == pytest.approx([1 - 33 / 96])


def test_dead_needs_a_rectifier():
    with pytest.raises(ValueError, match="'tanh' has none: use `dormant`"):
        activity.dead(constant([0.0, 1.0]), "tanh")
    with pytest.raises(ValueError, match="not for 'gelu'"):
        activity.saturated(constant([0.0]), "gelu")


def test_saturated_units():
    h = torch.tensor([[[0.995, 0.995, 0.0], [-0.999, 0.5, 0.0]]])
    assert activity.saturated(h, "tanh").tolist() == [[True, False, False]]
    h = torch.tensor([[[0.001, 0.5], [0.999, 0.999]]])
    assert activity.saturated(h, "sigmoid").tolist() == [[True, False]]
    h = torch.tensor([[[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]])
    assert activity.saturated(h, "relu").tolist() == [[True, False, False]]


def test_duplicate_units():
    """Unit 1 is twice unit 0; unit 2 has cosine 0.8 with them."""
    h = torch.tensor([[[1.0, 2.0, 0.8], [0.0, 0.0, 0.6]]])
    assert activity.duplicate(h).tolist() == [[True, False, False]]
    assert activity.duplicate(h, 0.7).tolist() == [[True, True, False]]


def test_grad_dormant_takes_the_norm_of_incoming_gradients():
    gradient = torch.tensor([[[3.0, 4.0], [0.0, 0.1], [0.0, 0.0]]])  # norms 5, 0.1, 0
    assert activity.grad_dormant(gradient, 0.0).tolist() == [[False, False, True]]
    assert activity.grad_dormant(gradient, 0.1).tolist() == [[False, True, True]]


def test_crelu_units_count_once():
    """[relu(z), relu(-z)]: a unit is dead only if both halves are."""
    z = torch.tensor([[[1.0, -1.0, 0.0], [-2.0, -1.0, 0.0]]])
    h = activity.fold_copies(torch.cat([z.relu(), (-z).relu()], 2), 3)
    assert h.shape == (1, 2, 3, 2)
    assert activity.dead(h, "crelu").tolist() == [[False, False, True]]
    plain = torch.ones(1, 2, 3)
    assert activity.fold_copies(plain, 3) is plain


def test_members_do_not_mix():
    h = torch.rand(3, 16, 6, generator=torch.Generator().manual_seed(0)).sub_(0.3).relu_()
    h[1] *= 100
    h[2, :, :2] = 0
    for function in (lambda x: activity.dormant(x, 0.1), lambda x: activity.dead(x, "relu"), activity.duplicate):
        alone = torch.cat([function(h[k : k + 1]) for k in range(3)])
        assert torch.equal(function(h), alone)
