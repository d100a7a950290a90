"""Continual learning: what learns one task after another.

Here belong streams of tasks, the learner that owns the loop and the accuracy matrix, strategies, the metrics of the
field, and the bridge to Avalanche. This room may import `plasticity`; it never imports `agents`.
"""

# The strategies of `continual.catalogue`, and GrowCLIP, here so that a page of help need not import torch.
NAMES = (
    "naive", "joint", "cumulative", "er", "er_ace", "der", "derpp", "uer", "ewc", "si", "lwf", "agem", "packnet", "dst",
    "hypernet", "chunked_hypernet", "grow", "mixture_growth", "growclip",
)  # fmt: skip
# Those of Avalanche, `continual.avalanche.baselines.SETTINGS`.
BASELINES = (
    "avalanche-naive", "avalanche-replay", "avalanche-ewc", "avalanche-si", "avalanche-lwf", "avalanche-mas",
    "avalanche-agem", "avalanche-gem", "avalanche-der", "avalanche-er_ace", "avalanche-mir", "avalanche-gdumb",
    "avalanche-cumulative",
)  # fmt: skip
