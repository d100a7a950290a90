"""Stacking against the exact checks of specs/growclip-and-growth.md, section E 17-19."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from continual.growth.characters import docstrings, encoded
from continual.growth.stack import (
    Gated,
    depth_map,
    random_depth,
    set_gates,
    stack_depth,
    stacking_tokens,
    widened,
    zero_depth,
)  # fmt: skip
from continual.growth.transformers import GPT, TransformerBlock
from continual.networks.classifier import draw
from plasticity.networks.stacked import stack


def perturbed(depth=3, seed=0, dtype=torch.float64) -> GPT:
    source = torch.Generator().manual_seed(seed)
    model = GPT.drawn(11, 7, 8, 2, 12, depth, source).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source, dtype=dtype))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(5))


def deeper(model: GPT, blocks: nn.ModuleList) -> GPT:
    return GPT(model.embedding, blocks, model.norm, model.head)


def test_17_layers_are_copies_of_the_layers_that_the_paper_says():
    assert depth_map(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    assert depth_map(3, 6, "interpolate") == [0, 0, 1, 1, 2, 2]
    assert depth_map(4, 6, "evenly") == [0, 0, 1, 2, 2, 3]
    assert depth_map(4, 6, "gradual") == [0, 1, 2, 3, 2, 3]
    model = perturbed()
    grown = stack_depth(model.blocks, 2)
    for index, source in enumerate((0, 1, 2, 0, 1, 2)):
        for name, value in grown[index].state_dict().items():
            assert torch.equal(value, model.blocks[source].state_dict()[name])
    places = [p.data_ptr() for blocks in (model.blocks, grown) for p in blocks.parameters()]
    assert len(set(places)) == len(places)
    with torch.no_grad():
        grown[0].get_parameter("up.weight").zero_()
    assert bool(grown[3].get_parameter("up.weight").any())
    same = stack_depth(model.blocks, 1)
    assert torch.equal(deeper(model, same)(tokens(2, 7)), model(tokens(2, 7)))


def test_stacks_that_cannot_be_are_refused():
    blocks = perturbed(2).blocks
    for g, order, said in (
        (0.5, "stack", "at least 1"),
        (1.3, "stack", "no whole number"),
        (1.5, "interpolate", "take evenly"),
        (3, "gradual", "doubles a stack at most"),
        (2, "twice", "unknown order"),
    ):
        with pytest.raises(ValueError, match=said):
            stack_depth(blocks, g, order)
    with pytest.raises(ValueError, match="same shapes"):
        stack_depth(nn.ModuleList([*blocks, TransformerBlock(8, 2, 16, causal=True)]), 2)


def test_18_when_to_stack_as_in_the_authors_table():
    for parameters, trained, wanted in (
        (8e9, 15e12, 6.58e9),
        (7e9, 2e12, 11.11e9),
        (13e9, 2e12, 15.84e9),
        (70e9, 2e12, 42.48e9),
    ):
        assert stacking_tokens(parameters, trained) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_19_zero_depth_keeps_the_function_and_stacking_does_not(dtype, near):
    model, x = perturbed(dtype=dtype), tokens(4, 7)
    wanted = model(x)
    zero = deeper(model, zero_depth(model.blocks, 7))
    assert len(zero.blocks) == 7
    torch.testing.assert_close(zero(x), wanted, rtol=0, atol=near)
    assert not torch.allclose(deeper(model, stack_depth(model.blocks, 2))(x), wanted, atol=1e-3)
    gated = random_depth(model.blocks, 5, lambda: perturbed(1, 3, dtype).blocks[0])
    torch.testing.assert_close(deeper(model, gated)(x), wanted, rtol=0, atol=near)
    set_gates(gated, 1.0)
    plain = nn.ModuleList(block.block if isinstance(block, Gated) else block for block in gated)
    torch.testing.assert_close(deeper(model, gated)(x), deeper(model, plain)(x), rtol=0, atol=near)
    for times in (1, 3):
        wide = widened(model, times, "direct", torch.Generator().manual_seed(1))
        torch.testing.assert_close(wide(x), wanted, rtol=0, atol=100 * near)
    bordered = widened(model, 2, "zero", torch.Generator().manual_seed(1)).blocks[0].state_dict()
    assert torch.equal(bordered["up.weight"][:12, :8], model.blocks[0].get_parameter("up.weight"))
    assert not bordered["up.weight"][12:, :8].any()
    assert bordered["up.weight"][:, 8:].all()
    assert not bordered["qkv.weight"][8:16, :8].any()


def test_stacked_transformers_are_what_they_are_alone_and_causal():
    models = [perturbed(2, seed) for seed in (0, 1, 2)]
    x = tokens(3, 4, 7)
    together = stack(models)
    for index, model in enumerate(models):
        torch.testing.assert_close(together(x)[index], model(x[index]))
    changed = x.clone()
    changed[..., 5:] = 0
    torch.testing.assert_close(together(changed)[..., :5, :], together(x)[..., :5, :])
    gated = stack([deeper(m, random_depth(m.blocks, 3, lambda: perturbed(1).blocks[0])) for m in models])
    torch.testing.assert_close(gated(x), together(x))
    images = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vits = [draw("vit", (3, 8, 8), (8, 2, 12, 2), 4, True, (), torch.Generator().manual_seed(k)) for k in (0, 1)]
    for index, model in enumerate(vits):
        torch.testing.assert_close(stack(vits)(images)[index], model(images[index]), rtol=1e-4, atol=1e-5)


def test_characters_are_the_documentation_of_the_standard_library():
    text = docstrings(2_000)
    assert len(text) == 2_000
    assert docstrings(1_000) == text[:1_000]
    alphabet, codes = encoded(text)
    assert "".join(alphabet[i] for i in codes[:500].tolist()) == text[:500]
    assert int(codes.max()) + 1 == len(alphabet) <= 97
