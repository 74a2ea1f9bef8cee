"""What compaction would leave of a function, as a function of its parameters that runs inside a training step."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction import channels as channels_lib
from mtl_sparse.compaction.channels import Channels, Kernel, Needed
from mtl_sparse.sparsity.groups import by_path


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates (MACs) and parameters of a function, and how much of both compaction would leave.

    It follows the zeros of the kernels through the function: a channel is needed if a weight that is not zero leads
    from it to a needed output, and it is alive if such a weight leads to it from the inputs. Not included are weights
    that compaction keeps because gathering channels costs more than computing with zeros.

    Attributes:
      channels: of the function.
    """

    channels: Channels

    @functools.cached_property
    def macs(self) -> float:
        """MACs of the whole function, for the example inputs."""
        return sum(kernel.macs * kernel.size for kernel in self.channels.kernels)

    @functools.cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole function."""
        vectors = sum(x.size for x in self.channels.vectors.values())
        return (
            sum({kernel.path: kernel.size for kernel in self.channels.kernels}.values())
            + vectors
            + self.channels.others
        )

    def left(self, params: Any) -> dict[str, jax.Array]:
        """Return the fractions that compaction would leave.

        Args:
          params: the tree that the cost was made for, with values; jit-able.

        Returns:
          {"macs", "parameters"}: float32 [] each, in [0, 1].
        """
        leaves = by_path(params)
        nonzero = {kernel.path: _nonzero(kernel, leaves[kernel.path]) for kernel in self.channels.kernels}
        alive = self._alive(nonzero)
        needed = jnp.zeros(self.channels.count, bool)
        macs = jnp.zeros([], jnp.float32)
        kept: dict[str, jax.Array] = {}
        for event in reversed(self.channels.events):
            if isinstance(event, Needed):
                needed = needed.at[event.channels].set(True)
                continue
            weights = nonzero[event.path]
            out = _take(needed & alive, event.outputs)
            inputs = _reduce(weights & out & _take(alive, event.inputs), event.inputs, self.channels.count)
            needed = needed | inputs
            entries = _pairs(_take(inputs, event.inputs), out) * (event.size / _broadcast_size(event))
            macs = macs + event.macs * entries
            kept[event.path] = jnp.maximum(kept.get(event.path, 0.0), event.read * entries)
        vectors = sum((jnp.sum(_take(needed & alive, x)) for x in self.channels.vectors.values()), jnp.zeros([]))
        parameters = sum(kept.values()) + vectors + self.channels.others
        return {"macs": macs / self.macs, "parameters": parameters / self.parameters}

    def _alive(self, nonzero: dict[str, jax.Array]) -> jax.Array:
        """Return which channels depend on the inputs: bool [channels]."""
        alive = np.zeros(self.channels.count, bool)
        alive[self.channels.sources] = True
        found = jnp.asarray(alive)
        for kernel in self.channels.kernels:
            made = nonzero[kernel.path] & _take(found, kernel.inputs)
            found = found | _reduce(made, kernel.outputs, self.channels.count)
        return found


def from_function(fn: Any, params: Any, *inputs: Any, unroll: bool = False) -> Cost:
    """Find the cost of a function.

    Args:
      fn: pure function of (params, *inputs).
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      *inputs: example inputs, pytrees of the same.
      unroll: whether to unroll `lax.scan`.

    Returns:
      Its cost. `TargetSparsity(0.75, steps, measure=lambda params: 1 - cost.left(params)["macs"])` finds the lambda
      that leaves a quarter of the MACs.

    Raises:
      UserError: see `channels.of`.
    """
    return Cost(channels_lib.of(fn, params, *inputs, unroll=unroll))


def _nonzero(kernel: Kernel, leaf: jax.Array) -> jax.Array:
    """Return where a kernel has weights that are not zero, with length 1 along the axes without channels."""
    shape = np.broadcast_shapes(kernel.inputs.shape, kernel.outputs.shape)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return jnp.any(leaf != 0, axes, keepdims=True)


def _take(values: jax.Array, numbers: np.ndarray) -> jax.Array:
    """Return the values of the channels of a kernel's entries; True where an entry has none."""
    return values[np.maximum(numbers, 0)] | (numbers < 0)


def _reduce(values: jax.Array, numbers: np.ndarray, count: int) -> jax.Array:
    """Return for each channel whether one of its entries is True: bool [count]."""
    axes = tuple(axis for axis, size in enumerate(numbers.shape) if size == 1)
    flat = jnp.any(values, axes).reshape(-1)
    return jnp.zeros(count + 1, bool).at[np.where(numbers < 0, count, numbers).reshape(-1)].max(flat)[:count]


def _broadcast_size(kernel: Kernel) -> int:
    return math.prod(np.broadcast_shapes(kernel.inputs.shape, kernel.outputs.shape))


def _pairs(inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """Return the number of entries, without the axes that have no channels, whose input and output are kept."""
    disjoint = all(m == 1 or n == 1 for m, n in zip(inputs.shape, outputs.shape, strict=True))
    if disjoint:
        return jnp.sum(inputs, dtype=jnp.float32) * jnp.sum(outputs, dtype=jnp.float32)
    return jnp.sum(inputs & outputs, dtype=jnp.float32)
