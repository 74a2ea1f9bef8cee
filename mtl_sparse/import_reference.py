"""Checkpoints of the reference implementation as models; the public name of `mtl_sparse.pretrained.reference`."""

from mtl_sparse.pretrained.reference import TASKS, from_state_dict

__all__ = ["TASKS", "from_state_dict"]
