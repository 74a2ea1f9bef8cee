"""Compaction of other packages' models: what is removed, and whether the outputs stay equal.

Usage: python -m benchmarks.zoo --help
"""
