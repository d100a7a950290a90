"""What networks of continual learning add to those of `plasticity`: dropout of a population, shortcuts, CIFAR tasks."""

from __future__ import annotations

import torch

from continual import datasets
from continual.networks.classifier import draw
from continual.networks.hypernet import Dropout, ZeroPaddedShortcut
from plasticity.networks.stacked import stack
from plasticity.problems.datasets import Images


def drawn(seed: int) -> Dropout:
    layer = Dropout(0.25)
    layer.draw_from(torch.Generator().manual_seed(seed))
    return layer


def test_each_member_drops_out_by_itself_and_goes_on_with_its_state():
    x = torch.ones(2, 50, 8)
    together, alone = stack([drawn(0), drawn(1)]), drawn(1)
    first = together(x)
    assert torch.equal(first[1], alone(x[1]))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first.unique(), torch.tensor([0, 1 / 0.75]))
    assert 0.6 < float((first > 0).float().mean()) < 0.9
    state = {name: value.clone() for name, value in together.state_dict().items()}
    again = stack([drawn(5), drawn(6)])
    again.load_state_dict(state)
    assert torch.equal(again(x), together(x))
    assert torch.equal(together.eval()(x), x)


def test_shortcuts_halve_the_image_and_add_channels_of_zeros():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    y = ZeroPaddedShortcut(2)(x)
    assert y.shape == (2, 5, 2, 2)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert float(y[:, 3:].abs().max()) == 0
    members = [draw("resnet32", (1, 8, 8), (2, 2, 4), 3, True, (), torch.Generator().manual_seed(k)) for k in (0, 1)]
    images = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    together = stack(members)(images)
    for index, member in enumerate(members):
        torch.testing.assert_close(together[index], member(images[index]), rtol=1e-4, atol=1e-4)


def test_cifar_tasks_are_all_of_the_first_and_half_of_the_second(monkeypatch):
    def made(name: str, folder: object) -> Images:
        classes = {"cifar10": 10, "cifar100": 100}[name]
        labels = torch.arange(classes).repeat(2)
        pixels = torch.full((len(labels), 3, 2, 2), classes, dtype=torch.uint8)
        return Images(name, pixels, labels, pixels[:classes], labels[:classes], 255, name)

    monkeypatch.setattr("plasticity.problems.datasets.load", made)
    found = datasets.cifar10_100()
    assert found.train_labels.bincount().tolist() == [2] * 60
    assert found.test_labels.sort().values.tolist() == list(range(60))
    assert found.train_images[found.train_labels < 10].unique().tolist() == [10]
    assert found.train_images[found.train_labels >= 10].unique().tolist() == [100]
