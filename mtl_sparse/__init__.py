"""Parsimonious multi-task vision models: group sparsity on a shared backbone, in JAX and Flax.

The public API, loaded when a name is first used, so that importing the package is fast:

  proximal, proximal_adam: any optax optimizer, or Adam, with a sparsity penalty.
  hold_norm, freeze_zeros, phased, TargetSparsity, GroupLasso, GroupL0, GroupMCP, L1, AdamMetric: its links and options.
  group_lasso, group_l0, group_mcp, l1: the proximal operators alone.
  compact: a multi-task model without its zero channels, with the same outputs.
  compaction.compact: the same for any JAX function (`from mtl_sparse import compaction`).
  train, load_model: a training run from a config, and its best model.
  Task, TASKS: what a task is, and the table of tasks.
  UserError: an error that the user can fix, with a stable code.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from mtl_sparse.compaction.multitask import compact
    from mtl_sparse.jobs.train import train
    from mtl_sparse.runtime.errors import UserError
    from mtl_sparse.sparsity import (
        L1,
        AdamMetric,
        GroupL0,
        GroupLasso,
        GroupMCP,
        TargetSparsity,
        freeze_zeros,
        group_l0,
        group_lasso,
        group_mcp,
        hold_norm,
        l1,
        phased,
        proximal,
        proximal_adam,
    )
    from mtl_sparse.tasks import TASKS, Task
    from mtl_sparse.training.setup import load_model

__all__ = [
    "L1",
    "TASKS",
    "AdamMetric",
    "GroupL0",
    "GroupLasso",
    "GroupMCP",
    "TargetSparsity",
    "Task",
    "UserError",
    "compact",
    "freeze_zeros",
    "group_l0",
    "group_lasso",
    "group_mcp",
    "hold_norm",
    "l1",
    "load_model",
    "phased",
    "proximal",
    "proximal_adam",
    "train",
]

_ELSEWHERE = {  # the others are of mtl_sparse.sparsity
    "TASKS": "tasks",
    "Task": "tasks",
    "UserError": "runtime.errors",
    "compact": "compaction.multitask",
    "load_model": "training.setup",
    "train": "jobs.train",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'sparsity')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
