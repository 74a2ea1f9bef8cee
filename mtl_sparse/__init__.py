"""Parsimonious multi-task vision models: group sparsity on a shared backbone, in JAX and Flax."""

__version__ = "0.1.0"
