"""The state of a strategy of Avalanche between two tasks, as tensors and plain values, and back.

Avalanche's own checkpoints are pickles, and with 0.6.0 and today's packages they cannot be written. Here a strategy and
its plugins are walked: tensors, numbers, collections, networks, optimisers, data sets (as tensors), and objects of
Avalanche's own. Whatever else there is, functions and loaders, is as the freshly built strategy has it. What is loaded
runs no code: of classes only those of `avalanche.training` are made, without calling them.
"""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.data_loader import GroupBalancedInfiniteDataLoader
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.training.plugins import AGEMPlugin, EvaluationPlugin, MIRPlugin
from avalanche.training.utils import ParamData, cycle
from torch import Tensor, nn
from torch.utils.data import DataLoader

from continual.avalanche.parts import Losses, dataset

_ROOM = "avalanche.training"
# Of the strategy itself: of one call of `train`, or written on their own below.
_PASSING = {
    "model", "optimizer", "optimized_param_id", "plugins", "evaluator", "experience", "mbatch", "mb_output", "loss",
    "dataloader", "adapted_dataset", "current_eval_stream", "device",
}  # fmt: skip
_COLLECTIONS: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_MAPPINGS = (dict, OrderedDict, defaultdict)
Plain = dict[str, Any]


def state_of(strategy: Any) -> Plain:
    """Everything that decides how a strategy goes on after a task."""
    own = {name: value for name, value in vars(strategy).items() if name not in _PASSING}
    plugins = [p for p in strategy.plugins if not isinstance(p, EvaluationPlugin)]
    return {
        "model": _taken(strategy.model),
        "optimizer": strategy.optimizer.state_dict(),
        "fields": _taken_fields(own),
        "plugins": [_taken_fields(vars(plugin)) for plugin in plugins],
    }


def restore(strategy: Any, saved: Mapping[str, Any]) -> None:
    """Give a freshly built strategy a saved state. Raises ValueError if it is of another one."""
    plugins = [p for p in strategy.plugins if not isinstance(p, EvaluationPlugin)]
    if len(plugins) != len(saved["plugins"]):
        raise ValueError("the saved strategy of Avalanche has other plugins")
    strategy.model = _given(saved["model"], strategy.model, strategy.model)
    strategy.make_optimizer(reset_optimizer_state=True)
    strategy.optimizer.load_state_dict(saved["optimizer"])
    _give_fields(strategy, saved["fields"], strategy.model)
    for plugin, fields in zip(plugins, saved["plugins"], strict=True):
        _give_fields(plugin, fields, strategy.model)
    _rebuild_loaders(strategy)


def _rebuild_loaders(strategy: Any) -> None:
    """The loaders that two plugins keep from one task to the next, as these make them."""
    labels = next(plugin for plugin in strategy.plugins if isinstance(plugin, Losses)).last_labels
    for plugin in strategy.plugins:
        if isinstance(plugin, AGEMPlugin) and plugin.buffers:
            size = plugin.sample_size // len(plugin.buffers)
            plugin.buffer_dataloader = GroupBalancedInfiniteDataLoader(
                plugin.buffers, batch_size=size, num_workers=0, pin_memory=False, persistent_workers=False
            )
            plugin.buffer_dliter = iter(plugin.buffer_dataloader)
        if isinstance(plugin, MIRPlugin):
            groups = plugin.storage_policy.buffer_groups.items()
            last = set(labels.tolist())
            buffer = concat_datasets([group.buffer for label, group in groups if int(label) not in last])
            several = len(buffer) > plugin.batch_size_mem
            data: Any = buffer
            loader = cycle(DataLoader(data, batch_size=plugin.subsample, shuffle=True)) if several else None
            plugin.replay_loader = loader  # type: ignore[assignment]


def _taken_fields(fields: Mapping[str, Any]) -> Plain:
    taken = {name: _taken(value) for name, value in fields.items()}
    return {name: value for name, value in taken.items() if value is not None}


def _taken(value: Any) -> Plain | None:
    """A value as plain ones; None: it is left as it is made."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": "value", "value": value}
    if isinstance(value, Tensor):
        return {"is": "value", "value": value.detach().clone()}
    if isinstance(value, ParamData):
        return {"is": "parameter", "name": value.name, "data": value.data.detach().clone()}
    if isinstance(value, nn.Module):
        return _taken_module(value)
    if isinstance(value, AvalancheDataset):
        return _taken_dataset(value)
    if type(value) in _MAPPINGS:
        items = [(key, _taken(inner)) for key, inner in value.items()]
        return {"is": "dict", "items": [[key, inner] for key, inner in items if inner is not None]}
    if type(value).__name__ in _COLLECTIONS and type(value).__module__ in ("builtins", "collections"):
        items = [_taken(inner) for inner in value]
        if any(inner is None for inner in items):
            return None
        return {"is": type(value).__name__, "items": items}
    kind = type(value)
    if kind.__module__.startswith(_ROOM) and not isinstance(value, EvaluationPlugin):
        return {"is": "object", "class": [kind.__module__, kind.__qualname__], "fields": _taken_fields(vars(value))}
    return None


def _taken_module(module: nn.Module) -> Plain:
    own = {name: _taken(value) for name, value in vars(module).items() if type(value) in (set, int)}
    return {
        "is": "module",
        "state": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "fields": {name: value for name, value in own.items() if value is not None},
        "training": module.training,
        "trained": any(p.requires_grad for p in module.parameters()),
    }


def _taken_dataset(data: Any) -> Plain:
    if not len(data):
        return {"is": "dataset", "x": None}
    attributes = data._data_attributes
    extra = [name for name in attributes if name not in ("targets", "targets_task_labels")]
    return {
        "is": "dataset",
        "x": torch.stack([data[i][0] for i in range(len(data))]),
        "y": torch.tensor([int(y) for y in attributes["targets"]]),
        "tasks": [int(task) for task in attributes["targets_task_labels"]],
        "extra": {name: torch.stack([attributes[name][i] for i in range(len(data))]) for name in extra},
    }


def _give_fields(target: Any, fields: Mapping[str, Any], model: nn.Module) -> None:
    for name, saved in fields.items():
        vars(target)[name] = _given(saved, vars(target).get(name), model)


def _given(saved: Plain, own: Any, model: nn.Module) -> Any:
    """The value of a saved one. own: what the strategy has in its place; model: what a copied network is like."""
    kind = saved["is"]
    if kind == "value":
        value = saved["value"]
        return value.clone() if isinstance(value, Tensor) else value
    if kind == "parameter":
        return ParamData(saved["name"], init_tensor=saved["data"].clone(), device=saved["data"].device)
    if kind == "module":
        return _given_module(saved, own if isinstance(own, nn.Module) else copy.deepcopy(model))
    if kind == "dataset":
        return _given_dataset(saved)
    if kind == "dict":
        known = own if isinstance(own, dict) else {}
        found = defaultdict(known.default_factory) if isinstance(known, defaultdict) else {}
        found.update({key: _given(inner, known.get(key), model) for key, inner in saved["items"]})
        return found
    if kind == "object":
        return _given_object(saved, own, model)
    return _COLLECTIONS[kind]([_given(inner, None, model) for inner in saved["items"]])


def _given_module(saved: Plain, module: nn.Module) -> nn.Module:
    module.load_state_dict(saved["state"])
    module.train(saved["training"])
    for p in module.parameters():
        p.requires_grad_(saved["trained"])
    for name, value in saved["fields"].items():
        vars(module)[name] = _given(value, None, module)
    return module


def _given_dataset(saved: Plain) -> Any:
    if saved["x"] is None:
        return concat_datasets([])
    found = dataset(saved["x"], saved["y"], saved["tasks"])
    names: dict[str, Any] = {name: list(values) for name, values in saved["extra"].items()}
    extra = [DataAttribute(FlatData([values]), name, use_in_getitem=True) for name, values in names.items()]
    return AvalancheDataset([found], data_attributes=extra) if extra else found


def _given_object(saved: Plain, own: Any, model: nn.Module) -> Any:
    module, name = saved["class"]
    if not module.startswith(_ROOM):
        raise ValueError(f"a saved strategy holds a {module}.{name}, which is none of Avalanche's training")
    kind = getattr(importlib.import_module(module), name)
    target = own if type(own) is kind else kind.__new__(kind)
    _give_fields(target, saved["fields"], model)
    return target
