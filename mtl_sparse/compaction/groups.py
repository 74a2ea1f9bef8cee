"""Groups of weights of any function, found in its jaxpr."""

import difflib
import re
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csgraph

from mtl_sparse.compaction import channels as channels_lib
from mtl_sparse.compaction.channels import Channels, Free, Kernel, Needed
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity.groups import ConvGroups, CoupledGroups, Groups


def from_function(
    fn: Any, params: Any, *inputs: Any, coupled: bool = False, kernels: str = ".*", unroll: bool = False
) -> tuple[Groups, ...]:
    """Find the groups of a function's weights.

    A group is what one input channel of a kernel is multiplied with: a slice of a convolution or of a dense layer's
    kernel, a channel of a depthwise kernel, the rows of one attention head. They partition the weights of the kernels.
    With `coupled`, the slices of one channel in all kernels that read it are one group: then the channel is removed by
    compaction, and the filters that make it, wherever its group is zero.

    Args:
      fn: pure function of (params, *inputs).
      params: pytree of arrays or of `jax.ShapeDtypeStruct`; groups have its paths, so pass the tree that the optimizer
        gets.
      *inputs: example inputs, pytrees of the same.
      coupled: whether groups span kernels.
      kernels: regular expression of whole paths. Without `coupled`, the kernels that match; with it, the channels that
        a matching kernel reads or makes, in all kernels that read them.
      unroll: whether to unroll `lax.scan`.

    Returns:
      The groups, for `Penalty.groups`; their costs are multiply-accumulates of the example inputs: those of the group,
      and those of the filters that make its channel, divided among the groups that read it.

    Raises:
      UserError: no kernel is found, or none that matches `kernels`.
    """
    return of(channels_lib.of(fn, params, *inputs, unroll=unroll), coupled=coupled, kernels=kernels)


def of(channels: Channels, *, coupled: bool = False, kernels: str = ".*") -> tuple[Groups, ...]:
    """Return the groups of a function's channels, see `from_function`."""
    unique = {kernel.path: kernel for kernel in channels.kernels}
    named = [kernel for path, kernel in unique.items() if re.fullmatch(kernels, path)]
    if not named:
        near = difflib.get_close_matches(kernels, unique, 3) or list(unique)[:3]
        raise UserError(
            "NO_SUCH_KERNEL",
            f"expected a regular expression of a kernel's whole path, got {kernels!r}, which matches none of "
            f"{len(unique)}; kernels are, for instance, {', '.join(near)}",
        )
    if not coupled:
        making, readers = _making(channels), _readers(channels)
        return tuple(_alone(kernel, _reading(channels, kernel.path), making, readers) for kernel in named)
    wanted = np.zeros(channels.count, bool)
    for kernel in named:
        for numbers in (kernel.inputs, kernel.outputs):
            wanted[numbers[numbers >= 0]] = True
    return _coupled(channels, list(unique.values()), wanted)


def axes(channels: Channels) -> dict[str, int]:
    """Return for the path of each kernel the axis whose entries are its groups; without kernels that have no such axis.

    It is the axis of input channels; of a depthwise kernel, the one that has the channels.
    """
    found = of(channels)
    return {one.path: one.axis for one in found if isinstance(one, ConvGroups)}


def on_every_path(channels: Channels) -> tuple[str, ...]:
    """Return the paths of the kernels on every path from the inputs to one of the kernels that end the function.

    While a function's output depends on its inputs, none of them is entirely zero.
    """
    last = channels.events[-1]
    kernels = {place: event for place, event in enumerate(channels.events) if isinstance(event, Kernel)}
    ends = [place for place in last.makers if place in kernels] if isinstance(last, Needed) else []
    found = {}
    for end in ends:
        for kernel in kernels.values():
            if not _reaches_inputs(channels, end, kernel.path):
                found[kernel.path] = True
    return tuple(found)


def _reaches_inputs(channels: Channels, end: int, without: str) -> bool:
    """Return whether an event depends on the inputs where the kernel `without` makes nothing."""
    seen, waiting = {end}, [end]
    while waiting:
        event = channels.events[waiting.pop()]
        if isinstance(event, Free):
            return True
        if isinstance(event, Kernel) and event.path != without:
            more = event.makers - seen
            seen |= more
            waiting += more
    return False


def _reading(channels: Channels, path: str) -> float:
    """Return the multiply-accumulates of one entry of a kernel."""
    return sum(kernel.macs for kernel in channels.kernels if kernel.path == path)


def _making(channels: Channels) -> np.ndarray:
    """Return the multiply-accumulates that make each channel; 0 where an equation that mixes channels needs it."""
    found = np.zeros(channels.count)
    for event in channels.events:
        if isinstance(event, Needed):
            found[event.channels] = np.nan
        elif isinstance(event, Kernel) and event.outputs.min() >= 0 and not _same(event):
            # a depthwise kernel counts as a reader
            _, count = _entries(event.outputs, event.shape)
            np.add.at(found, event.outputs.reshape(-1), event.macs * count)
    return np.nan_to_num(found)


def _same(kernel: Kernel) -> bool:
    """Return whether each entry of a kernel reads the channel that it makes: a depthwise kernel."""
    return kernel.inputs.shape == kernel.outputs.shape and np.array_equal(kernel.inputs, kernel.outputs)


def _readers(channels: Channels) -> np.ndarray:
    """Return how many kernels read each channel."""
    found = np.zeros(channels.count, int)
    for kernel in {kernel.path: kernel for kernel in channels.kernels}.values():
        found[np.unique(kernel.inputs)] += 1
    return found


def _entries(numbers: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Return (numbers as a list, entries of the parameter for each of them)."""
    return numbers.reshape(-1), int(np.prod(shape)) // numbers.size


def _alone(kernel: Kernel, reading: float, making: np.ndarray, readers: np.ndarray) -> Groups:
    """Return the groups of one kernel."""
    numbers, each = _entries(kernel.inputs, kernel.shape)
    names, own = np.unique(numbers, return_inverse=True)
    sizes = np.bincount(own, minlength=len(names)) * float(each)
    costs = reading * sizes + making[names] / np.maximum(readers[names], 1)
    axes = [axis for axis, size in enumerate(kernel.inputs.shape) if size > 1]
    if len(axes) <= 1 and len(names) == len(numbers):
        axis = axes[0] if axes else _one_axis(kernel)
        return ConvGroups(kernel.path, axis, len(numbers), each, costs[own])
    return CoupledGroups(
        kernel.path, (kernel.path,), (own.reshape(kernel.inputs.shape).astype(np.int32),), len(names), sizes, costs
    )


def _one_axis(kernel: Kernel) -> int:
    """Return an axis of length 1, which has the one group of a kernel with a single input; the second last in HWIO."""
    return max(axis for axis, size in enumerate(kernel.shape) if size == 1)


class _Part(NamedTuple):
    """A kernel's part in coupled groups."""

    kernel: Kernel
    numbers: np.ndarray  # channels, as a list
    each: int  # entries of the kernel for each number
    reading: float


def _coupled(channels: Channels, kernels: list[Kernel], wanted: np.ndarray) -> tuple[Groups, ...]:
    """Return the groups of the channels that are wanted, in sets of kernels that have channels in common."""
    parts = []
    for kernel in kernels:
        if wanted[kernel.inputs].any():
            parts.append(_Part(kernel, *_entries(kernel.inputs, kernel.shape), _reading(channels, kernel.path)))
    rows = np.concatenate([np.full(len(part.numbers), i) for i, part in enumerate(parts)])
    columns = np.concatenate([part.numbers for part in parts])
    shape = (len(parts) + channels.count,) * 2
    links = coo_matrix((np.ones(len(rows), bool), (rows, len(parts) + columns)), shape)
    _, label = csgraph.connected_components(links, directed=False)
    making, found = _making(channels), []
    for one in dict.fromkeys(label[: len(parts)]):
        mine = [part for i, part in enumerate(parts) if label[i] == one]
        names, first = np.unique(np.concatenate([part.numbers for part in mine]), return_index=True)
        names = names[np.argsort(first)]  # the first kernel's in order
        place = np.full(channels.count, -1, np.int32)
        place[names] = np.arange(len(names))
        sizes, costs = np.zeros(len(names)), making[names].copy()
        for part in mine:
            np.add.at(sizes, place[part.numbers], part.each)
            np.add.at(costs, place[part.numbers], part.each * part.reading)
        numbers = tuple(place[part.kernel.inputs] for part in mine)
        paths = tuple(part.kernel.path for part in mine)
        found.append(CoupledGroups(paths[0], paths, numbers, len(names), sizes, costs))
    return tuple(found)
