"""What is known of a graph's variables when the parameters are concrete: values, and slices that are constant."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction.graph import Graph, Node

_MOST_ELEMENTS = 2**27  # larger intermediate values are not evaluated


@dataclasses.dataclass(frozen=True)
class Known:
    """Slices along one axis that are constant.

    Attributes:
      mask: which slices [n] hold one value everywhere.
      values: that value [n]; meaningless outside the mask.
    """

    mask: np.ndarray
    values: np.ndarray

    @classmethod
    def nothing(cls, size: int, dtype: Any) -> "Known":
        """Return facts by which no slice is known to be constant."""
        return cls(np.zeros(size, bool), np.zeros(size, dtype))

    @property
    def zeros(self) -> np.ndarray:
        """Which slices are zero everywhere."""
        return self.mask & (self.values == 0)


class Facts:
    """Values of what depends on the parameters alone, and constant slices of everything else.

    Attributes:
      graph: the graph.
      known: for each variable, its constant slices by axis.
      foldable: weights which can hold the product with constant inputs in their place.
      folded: sums whose result one of its operands can hold, because it is constant: the result -> the other operand.
    """

    def __init__(self, graph: Graph, values: Sequence[np.ndarray | None] | None) -> None:
        """Create facts.

        Args:
          graph: the graph.
          values: the parameters' leaves; None if nothing is known of them.
        """
        self.graph = graph
        self._values: dict[int, np.ndarray | None] = {}
        if values is None:
            self._values.update(dict.fromkeys(graph.params))
        else:
            self._values.update(zip(graph.params, values, strict=True))
        self._made_by = {variable: node for node in graph.nodes for variable in node.outputs}
        self._zeros: dict[tuple[int, int], np.ndarray] = {}
        self.known: list[dict[int, Known]] = [{} for _ in graph.avals]
        self.foldable: set[int] = set()
        self.folded: dict[int, int] = {}

    def value(self, variable: int) -> np.ndarray | None:
        """Return the value of a variable that depends on no input; None if it is not known."""
        if variable in self._values:
            return self._values[variable]
        graph = self.graph
        if variable in graph.constants:
            value = graph.constants[variable]
            self._values[variable] = _as_numpy(value) if hasattr(value, "dtype") else np.asarray(value)
            return self._values[variable]
        if graph.varies[variable]:
            return None
        node = self._made_by[variable]
        operands = [self.value(i) for i in node.inputs]
        outputs: Sequence[Any] = [None] * len(node.outputs)
        small = all(math.prod(graph.shape(i)) <= _MOST_ELEMENTS for i in node.outputs)
        if small and all(x is not None for x in operands):
            outputs = evaluate(node, operands, [graph.avals[i] for i in node.outputs])
        self._values.update(zip(node.outputs, outputs, strict=True))
        return self._values[variable]

    def zeros(self, variable: int, axis: int) -> np.ndarray:
        """Return which slices along an axis are known to be zero everywhere."""
        found = self._zeros.get((variable, axis))
        if found is None:
            size = self.graph.shape(variable)[axis]
            if self.graph.varies[variable]:
                known = self.known[variable].get(axis)
                found = np.zeros(size, bool) if known is None else known.zeros
            else:
                value = self.value(variable)
                found = np.zeros(size, bool)
                if value is not None and value.size:
                    x = squeezed(value)
                    found = ~(x != 0).any(tuple(i for i in range(x.ndim) if i != axis))
                    found = np.broadcast_to(found, size) if len(found) != size else found
            self._zeros[variable, axis] = found
        return found

    def idle(self, variable: int, axis: int, weights: int) -> np.ndarray:
        """Return which inputs of a product with weights are not needed, because they are zero or can be folded."""
        if weights in self.foldable and self.graph.varies[variable]:
            known = self.known[variable].get(axis)
            if known is not None:
                return known.mask
        return self.zeros(variable, axis)

    def along(self, variable: int, axis: int) -> Known | None:
        """Return the constant slices of a variable along an axis; None if there are none."""
        if self.graph.varies[variable]:
            return self.known[variable].get(axis)
        value = self.value(variable)
        if value is None:
            return None
        size = self.graph.shape(variable)[axis]
        x = squeezed(value)
        if x.size == x.shape[axis]:
            return Known(np.ones(size, bool), np.broadcast_to(x.reshape(-1), size))
        zeros = self.zeros(variable, axis)
        return Known(zeros, np.zeros(size, x.dtype)) if zeros.any() else None


def squeezed(x: np.ndarray) -> np.ndarray:
    """Return an array with only one entry along each axis along which NumPy's broadcasting repeats it."""
    return x[
        tuple(slice(0, 1) if step == 0 and n > 1 else slice(None) for step, n in zip(x.strides, x.shape, strict=True))
    ]


def _is_numeric(aval: Any) -> bool:
    return isinstance(aval.dtype, np.dtype)


def _broadcast(x: np.ndarray, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any) -> np.ndarray:
    sizes = [1] * len(shape)
    for axis, place in enumerate(broadcast_dimensions):
        sizes[place] = x.shape[axis]
    return np.broadcast_to(x.reshape(sizes), shape)


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axes, **_: function(x, axis=tuple(axes))


_POINTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda x, y: x / y if np.issubdtype(x.dtype, np.inexact) else None,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    "exp": np.exp,
    "abs": np.abs,
    "square": np.square,
}
_SHAPED: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "transpose": lambda x, permutation: x.transpose(permutation),
    "squeeze": lambda x, dimensions: x.squeeze(tuple(dimensions)),
    "reduce_sum": _reduce(np.sum),
    "reduce_max": _reduce(np.max),
    "copy": lambda x: x,
    "stop_gradient": lambda x: x,
}


def evaluate(node: Node, operands: Sequence[Any], outputs: Sequence[Any]) -> list[np.ndarray | None]:
    """Evaluate an equation on arrays.

    Args:
      node: the equation.
      operands: NumPy arrays.
      outputs: shape and dtype of each result.

    Returns:
      The results; None for one that has no NumPy form. Cheap equations are evaluated by NumPy, others by JAX.
    """
    with np.errstate(all="ignore"):
        if node.name in _POINTWISE:
            found = _POINTWISE[node.name](*(squeezed(np.asarray(x)) for x in operands))
            if found is not None:
                return [np.broadcast_to(found.astype(outputs[0].dtype), outputs[0].shape)]
        if not operands:  # an iota
            return [_as_numpy(x) for x in bind(node, [], node.params)]
        real = np.issubdtype(np.asarray(operands[0]).dtype, np.floating) and np.issubdtype(
            outputs[0].dtype, np.floating
        )
        if node.name == "convert_element_type" and real:
            return [np.broadcast_to(squeezed(operands[0]).astype(outputs[0].dtype), outputs[0].shape)]
        if node.name in _SHAPED:
            found = _SHAPED[node.name](operands[0], **node.params)
            return [np.broadcast_to(found.astype(outputs[0].dtype), outputs[0].shape)]
        with jax.ensure_compile_time_eval():
            values = bind(node, [jnp.asarray(x) for x in operands], node.params)
    return [_as_numpy(x) for x in values]


def _as_numpy(x: Any) -> np.ndarray | None:
    """Return an array as NumPy's; None for a random key, and for what has no value yet inside jit."""
    return np.asarray(x) if _is_numeric(x) and not isinstance(x, jax.core.Tracer) else None


def bind(node: Node, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Apply an equation's primitive and return its results."""
    if node.call is not None:
        return node.call(*operands)
    out = node.primitive.bind(*operands, **params)
    return list(out) if getattr(node.primitive, "multiple_results", False) else [out]
