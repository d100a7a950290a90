"""What keeps the network of a strategy able to learn: the interventions of `plasticity`, on all members at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from plasticity.adam import Adam
from plasticity.intervention import Intervention, Learner
from plasticity.networks.structure import find_structure
from plasticity.plastic_optimizer import PlasticOptimizer, check_fits, other_optimizer
from plasticity.sgd import SGD


def plastic_optimizer(
    network: nn.Module,
    plain: Adam | SGD,
    interventions: Sequence[Intervention],
    generators: Sequence[torch.Generator],
    fresh: Callable[[torch.Generator], nn.Module],
) -> PlasticOptimizer:
    """`plain`, the optimiser of a population's network, or that of an intervention, with the interventions around it.

    generators: of each member, for what interventions draw. fresh: draws one member's network. Raises ValueError if an
    intervention cannot act there.
    """
    for intervention in interventions:
        check_fits(intervention, "strategies")
    learner = Learner(network, find_structure(network), plain, len(generators), generators, fresh)
    other = other_optimizer(network, learner, interventions, plain.learning_rate)
    return PlasticOptimizer(learner, other or plain, interventions)
