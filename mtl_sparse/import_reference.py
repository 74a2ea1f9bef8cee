"""Conversion of the reference implementation's checkpoints; public name of `mtl_sparse.pretrained.reference`."""

from mtl_sparse.pretrained.reference import TASKS, from_state_dict

__all__ = ["TASKS", "from_state_dict"]
