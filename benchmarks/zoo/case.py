"""A case of the zoo: a model of some package as a pure JAX function."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Case:
    """Say how to build one model.

    Attributes:
        package: the package that the model is from.
        model: its name there, with its arguments where they matter.
        build: builds `(fn, params)` with `fn(params, images) -> output` in inference mode.
        shape: one input's shape without the batch axis.
        layout: "io" where a kernel's second last axis is its input, "oi" where it is the axis 1.
        memory: what it needs; big cases run last.
    """

    package: str
    model: str
    build: Callable[[], tuple[Callable[..., Any], Any]]
    shape: tuple[int, ...] = (64, 64, 3)
    layout: str = "io"
    big: bool = False

    @property
    def name(self) -> str:
        """Return the name that the command line and the record's file use."""
        return f"{self.package}:{self.model}"


def key() -> jax.Array:
    """Return the key that every model is initialized with; its weights are drawn anew afterwards."""
    return jax.random.PRNGKey(0)


def load(module: str) -> Any:
    """Return a module of a package that only the zoo needs; docs/zoo.md has the command that installs them all."""
    return importlib.import_module(module)
