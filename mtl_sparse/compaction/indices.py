"""Index lists: which of an axis's entries an array of the compact function holds, and in which order."""

from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax


class _Uniform:
    """The axis is held once, because all its entries are equal."""

    def __repr__(self) -> str:
        return "UNIFORM"


UNIFORM: Final = _Uniform()

# None is all entries in order; an array [k] of int is those entries, in that order. The entry after the last one, if it
# is held, is that of weights which read a constant 1.
Index = None | np.ndarray | _Uniform
Indices = tuple[Index, ...]

_MOST_SLICES = 8  # above, one gather is faster than slices that are joined again


class Missing(Exception):
    """Entries are needed that an operand does not hold.

    Attributes:
      operand: index of the operand.
      axis: its axis.
      mask: the entries that are needed.
    """

    def __init__(self, operand: int, axis: int, mask: np.ndarray) -> None:
        """Create the exception."""
        super().__init__(f"operand {operand} lacks entries of axis {axis}")
        self.operand, self.axis, self.mask = operand, axis, mask


def tidy(index: Index, size: int) -> Index:
    """Return None in place of an index that is all entries in order."""
    if isinstance(index, np.ndarray) and len(index) == size and np.array_equal(index, np.arange(size)):
        return None
    return index


def listed(index: Index, size: int) -> np.ndarray:
    """Return the entries of an index that is not uniform."""
    return np.arange(size) if index is None else np.asarray(index)


def held(index: Index, size: int) -> int:
    """Return how many entries the array holds on an axis."""
    if index is None:
        return size
    return len(index) if isinstance(index, np.ndarray) else 1


def meet(one: Index, other: Index) -> Index:
    """Return the entries that both hold, in the order of the one that holds fewer."""
    if one is UNIFORM or other is None:
        return other if one is UNIFORM else one
    if other is UNIFORM or one is None:
        return one if other is UNIFORM else other
    first, second = np.asarray(one), np.asarray(other)
    if np.array_equal(first, second):
        return first
    if len(second) < len(first):
        first, second = second, first
    return first[np.isin(first, second)]


def without_constant(index: Index, size: int) -> tuple[Index, bool]:
    """Return the entries without that of a constant 1, and whether that was among them."""
    if isinstance(index, np.ndarray) and (index == size).any():
        return index[index != size], True
    return index, False


def positions(have: Index, want: np.ndarray, size: int) -> np.ndarray:
    """Return where an array that holds `have` has the entries `want`, which it must hold."""
    if have is None:
        return want
    table = np.full(size + 1, -1)
    table[np.asarray(have)] = np.arange(len(np.asarray(have)))
    found = table[want]
    if (found < 0).any():
        raise AssertionError("entries are missing")
    return found


def lacks(have: Index, want: Index, size: int) -> np.ndarray | None:
    """Return the entries `want` as a mask if an array that holds `have` lacks some of them, else None."""
    if want is UNIFORM or have is want:
        return None
    if have is None or have is UNIFORM:
        constant = isinstance(want, np.ndarray) and (want == size).any()
        return np.ones(size, bool) if constant else None
    mask, wanted = np.zeros(size + 1, bool), np.zeros(size + 1, bool)
    mask[np.asarray(have)] = True
    wanted[listed(want, size)] = True
    return wanted[:size] if (wanted & ~mask).any() else None


def ranges(places: np.ndarray) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) that follow each other in an array of integers."""
    if not len(places):
        return []
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(places, ends)]


def take(x: Any, places: np.ndarray, axis: int) -> Any:
    """Return the given places of an axis: by slices where these are few, else by a gather."""
    if len(places) == x.shape[axis] and np.array_equal(places, np.arange(len(places))):
        return x
    steps = np.unique(np.diff(places))
    if len(places) > 1 and len(steps) == 1 and steps[0] > 1:
        return lax.slice_in_dim(x, int(places[0]), int(places[-1]) + 1, int(steps[0]), axis)
    parts = ranges(places)
    if not parts:
        return lax.slice_in_dim(x, 0, 0, 1, axis)
    if len(parts) <= _MOST_SLICES:
        pieces = [lax.slice_in_dim(x, start, stop, 1, axis) for start, stop in parts]
        return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, axis)
    return jnp.take(x, places, axis, mode="clip")


def restrict(x: Any, have: Indices, want: Indices, shape: Sequence[int]) -> Any:
    """Return an array that holds `have` of `shape` with the entries `want`, which it must hold."""
    for axis, (mine, target, size) in enumerate(zip(have, want, shape, strict=True)):
        if target is UNIFORM:
            if mine is not UNIFORM:
                raise AssertionError("expected a uniform axis")
        elif mine is UNIFORM:
            if x.shape[axis] != held(target, size):
                x = jnp.broadcast_to(x, (*x.shape[:axis], held(target, size), *x.shape[axis + 1 :]))
        elif mine is not None or target is not None:
            x = take(x, positions(mine, listed(target, size), size), axis)
    return x


def embed(x: Any, have: Indices, want: Indices, shape: Sequence[int], *, total: bool = False) -> Any:
    """Return a derivative that holds `have` as one that holds `want`, with zeros in place of what is missing.

    Args:
      x: the derivative.
      have: what it holds.
      want: what it shall hold.
      shape: the dense derivative's shape.
      total: whether an axis that shall be held once is summed over, as for a cotangent.
    """
    for axis, (mine, target, size) in enumerate(zip(have, want, shape, strict=True)):
        if target is UNIFORM and total:
            x = x * size if mine is UNIFORM else jnp.sum(x, axis, keepdims=True)
        elif target is UNIFORM:
            x = lax.slice_in_dim(x, 0, 1, 1, axis)
        elif mine is UNIFORM and target is not UNIFORM:
            x = jnp.broadcast_to(x, (*x.shape[:axis], held(target, size), *x.shape[axis + 1 :]))
        elif mine is not UNIFORM and (mine is not None or target is not None):
            table = np.full(size + 1, -1)
            table[listed(mine, size)] = np.arange(x.shape[axis])
            x = _scattered(x, table[listed(target, size)], axis)
    return x


def _scattered(x: Any, places: np.ndarray, axis: int) -> Any:
    """Return the given places of an axis, with zeros where a place is -1: by slices where these are few."""
    before, after = places[:-1], places[1:]
    steps = ((before < 0) != (after < 0)) | ((after >= 0) & (after - before != 1))
    parts = np.split(places, np.flatnonzero(steps) + 1) if len(places) else []
    if len(parts) <= 2 * _MOST_SLICES:
        pieces = [
            lax.slice_in_dim(x, int(part[0]), int(part[-1]) + 1, 1, axis)
            if part[0] >= 0
            else jnp.zeros((*x.shape[:axis], len(part), *x.shape[axis + 1 :]), x.dtype)
            for part in parts
        ]
        return lax.concatenate(pieces, axis) if len(pieces) > 1 else pieces[0] if pieces else take(x, places, axis)
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, int(i == axis), 0) for i in range(x.ndim)])
    return take(padded, np.where(places < 0, x.shape[axis], places), axis)
