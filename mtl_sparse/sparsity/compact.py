"""`compact(model, variables)`, the public name of `mtl_sparse.compaction.multitask.compact`."""

from mtl_sparse.compaction.multitask import compact

__all__ = ["compact"]
