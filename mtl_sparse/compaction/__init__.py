"""Exact compaction: removal of the channels that zero groups make useless.

compact: a JAX function with the same outputs and fewer parameters.
plan, apply_plan, rewrite: its parts.
Link, register_rule: a rule for a primitive that has none.
"""

from mtl_sparse.compaction.function import compact, plan, rewrite
from mtl_sparse.compaction.plans import Plan, apply_plan
from mtl_sparse.compaction.primitives import register_rule
from mtl_sparse.compaction.rules import Link

__all__ = ["Link", "Plan", "apply_plan", "compact", "plan", "register_rule", "rewrite"]
