"""What compaction would leave of a function, as a function of its parameters that runs inside a training step."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction import channels as channels_lib
from mtl_sparse.compaction.channels import Channels, Free, Kernel, Needed, Places
from mtl_sparse.sparsity.groups import by_path


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates (MACs) and parameters of a function, and how much of both compaction would leave.

    It follows the zeros of the kernels through the function: a channel is needed if a weight that is not zero leads
    from it to a needed output, and it is alive if such a weight leads to it from the inputs. A grouped convolution
    keeps whole groups, and the same inputs and outputs of all groups. MACs are those of products with parameters;
    products whose weights are computed from parameters in a way that is not followed count as left whole. What
    compaction keeps for two other reasons is not counted: weights that it keeps because gathering channels costs more
    than computing with zeros, which are few; and what it keeps for channels that became constant but not zero (an input
    of a kernel for their effect, or a padded convolution that reads them), which is much only where whole layers are
    zero.

    Attributes:
      channels: the channels of the function.
    """

    channels: Channels

    @functools.cached_property
    def macs(self) -> float:
        """MACs of the whole function, for the example inputs."""
        return sum(kernel.macs * kernel.size for kernel in self.channels.kernels) + self.channels.other_macs

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
        weights = {kernel.path: _nonzero(kernel, leaves[kernel.path]) for kernel in self.channels.kernels}
        alive = self._alive(weights)
        needed = _Unions(self.channels.count)
        kept: dict[str, tuple[Kernel, jax.Array, jax.Array]] = {}
        for place, event in reversed(list(enumerate(self.channels.events))):
            if isinstance(event, Needed):
                needed.put(place, _mask(event.channels, self.channels.count) & alive.of(event.makers))
            if not isinstance(event, Kernel):
                continue
            inputs, outputs = _kept(event, weights[event.path], alive.of(event.makers), needed.of(event.readers))
            needed.put(place, _reduce(inputs, event.inputs, self.channels.count))
            before = kept.get(event.path)
            if before is not None:  # each use of a kernel computes with what any of them needs
                event = dataclasses.replace(event, macs=event.macs + before[0].macs)
                inputs, outputs = inputs | before[1], outputs | before[2]
            kept[event.path] = event, inputs, outputs
        macs, parameters = (jnp.asarray(x, jnp.float32) for x in (self.channels.other_macs, self.channels.others))
        for kernel, inputs, outputs in kept.values():
            entries = _entries(kernel, inputs, outputs)
            macs, parameters = macs + kernel.macs * entries, parameters + kernel.read * entries
        for vector in self.channels.vectors.values():
            kept_entries = jnp.sum(_take(needed.of(vector.readers), vector.channels))
            parameters = parameters + vector.size / vector.channels.size * kept_entries
        return {"macs": macs / self.macs, "parameters": parameters / self.parameters}

    def _alive(self, weights: dict[str, jax.Array]) -> "_Unions":
        """Return which channels each event makes that depend on the inputs."""
        made = _Unions(self.channels.count)
        for place, event in enumerate(self.channels.events):
            if isinstance(event, Free):
                made.put(place, _mask(event.channels, self.channels.count))
            elif isinstance(event, Kernel):
                reads = weights[event.path] & _take(made.of(event.makers), event.inputs)
                made.put(place, _reduce(reads, event.outputs, self.channels.count))
        return made


class _Unions:
    """Masks of channels, one for each of some events, and their unions."""

    def __init__(self, count: int) -> None:
        self._masks: dict[int, jax.Array] = {}
        self._unions: dict[Places, jax.Array] = {frozenset(): jnp.zeros(count, bool)}

    def put(self, place: int, mask: jax.Array) -> None:
        """Set the mask of an event."""
        self._masks[place] = mask

    def of(self, places: Places) -> jax.Array:
        """Return the union of the masks that some events have, from the largest part of it that is known."""
        places = places.intersection(self._masks)
        part = max((known for known in self._unions if known <= places), key=len)
        found = self._unions[part]
        for place in sorted(places - part):
            found = found | self._masks[place]
        self._unions[places] = found
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


def _mask(channels: np.ndarray, count: int) -> jax.Array:
    """Return the channels as a mask: bool [count]."""
    found = np.zeros(count, bool)
    found[channels] = True
    return jnp.asarray(found)


def _kept(kernel: Kernel, weights: jax.Array, alive: jax.Array, needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return which entries of a kernel compaction keeps, as two masks that both hold there.

    Args:
      kernel: the kernel.
      weights: mask of its weights that are not zero.
      alive: channels that depend on the inputs where it reads them.
      needed: channels that are needed where it makes them.

    Returns:
      (of the input channels, of the output channels), each broadcasts against the kernel.
    """
    out = _take(needed, kernel.outputs)
    reads = weights & out & _take(alive, kernel.inputs)
    if not kernel.slots:
        return _take(_reduce(reads, kernel.inputs, len(needed)), kernel.inputs), out
    groups, outputs = _any_of(out, kernel.slots[0]), _any_of(out, kernel.slots[2])
    inputs = _any_of(weights & groups & outputs & _take(alive, kernel.inputs), kernel.slots[1])
    return groups & inputs, groups & outputs


def _any_of(values: jax.Array, slot: np.ndarray) -> jax.Array:
    """Return for each entry whether one with the same number is True."""
    found = _reduce(jnp.broadcast_to(values, np.broadcast_shapes(values.shape, slot.shape)), slot, int(slot.max()) + 1)
    return found[slot]


def _entries(kernel: Kernel, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """Return the number of entries of a kernel where both masks hold."""
    shape = np.broadcast_shapes(kernel.inputs.shape, kernel.outputs.shape)
    each = kernel.size / math.prod(shape)
    disjoint = all(m == 1 or n == 1 for m, n in zip(inputs.shape, outputs.shape, strict=True))
    if disjoint:
        return each * jnp.sum(inputs, dtype=jnp.float32) * jnp.sum(outputs, dtype=jnp.float32)
    return each * jnp.sum(inputs & outputs, dtype=jnp.float32)
