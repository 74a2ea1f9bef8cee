"""Weights of other projects, converted to models of this package."""
