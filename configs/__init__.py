"""Configs: each module has a `get_config()`."""
