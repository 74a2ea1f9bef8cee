"""The method, usable alone: proximal operators, any optax optimizer with a sparsity penalty, statistics."""

from mtl_sparse.sparsity.control import TargetSparsity
from mtl_sparse.sparsity.groups import ConvGroups
from mtl_sparse.sparsity.metrics import AdamMetric
from mtl_sparse.sparsity.penalties import L1, GroupL0, GroupLasso, GroupMCP, Penalty
from mtl_sparse.sparsity.projections import FreezeZeros, HoldNorm, KeepStrongest, freeze_zeros, hold_norm
from mtl_sparse.sparsity.prox import group_l0, group_lasso, group_mcp, l1
from mtl_sparse.sparsity.schedules import Phases, phased
from mtl_sparse.sparsity.stats import Sparsity, sparsity
from mtl_sparse.sparsity.transform import ProximalState, proximal, proximal_adam

__all__ = [
    "L1",
    "AdamMetric",
    "ConvGroups",
    "FreezeZeros",
    "GroupL0",
    "GroupLasso",
    "GroupMCP",
    "HoldNorm",
    "KeepStrongest",
    "Penalty",
    "Phases",
    "ProximalState",
    "Sparsity",
    "TargetSparsity",
    "freeze_zeros",
    "group_l0",
    "group_lasso",
    "group_mcp",
    "hold_norm",
    "l1",
    "phased",
    "proximal",
    "proximal_adam",
    "sparsity",
]
