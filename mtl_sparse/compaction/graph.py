"""A JAX function as a flat list of equations, with named parameters.

Tracing inlines every call: `jit`, `checkpoint`, custom derivatives, and loops where that is asked. Calls that matter
for differentiation are remembered as regions, so that the rewritten function can make them again.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mtl_sparse.runtime.errors import UserError

# calls that mean no more than their body
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_lin", "named_call"})
# calls that mean their body, and something else when they are differentiated
_CHECKPOINTS = frozenset({"checkpoint", "remat2"})
_REGIONS = _CHECKPOINTS | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation.

    Attributes:
      primitive: what it computes; it has a `name` and a `bind`.
      params: its static parameters.
      inputs: variables that it reads.
      outputs: variables that it writes.
      where: the module or the scope that it comes from, as far as it is known.
      call: function of the operands that returns the results, for an equation that has functions as parameters.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    where: str
    call: Callable[..., list[Any]] | None = None

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.primitive.name

    @property
    def title(self) -> str:
        """Name of the primitive and where it comes from, for reports."""
        return f"{self.name} in {self.where}" if self.where else self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A call whose differentiation differs from that of its body.

    Attributes:
      eqn: the call.
      jaxpr: that it is an equation of.
      start: index of its first node.
      stop: index after its last node.
      inputs: variables of its operands.
      outputs: variables of its results.
    """

    eqn: Any
    jaxpr: Any
    start: int
    stop: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def is_custom(self) -> bool:
        """Return whether it has custom derivatives."""
        return self.eqn.primitive.name not in _CHECKPOINTS


@dataclasses.dataclass(eq=False)
class Graph:
    """Equations in order; a variable is an index of `avals`.

    Attributes:
      avals: shape and dtype of each variable.
      nodes: the equations.
      regions: calls with custom derivatives, and checkpoints; a nested call comes before the one around it.
      constants: variable -> array, for literals and for arrays that the function closes over.
      params: variables of the parameters' leaves.
      inputs: variables of the inputs' leaves.
      outputs: variables of the outputs' leaves.
      paths: path of each leaf of the parameters.
      output_paths: path of each leaf of the outputs.
      output_tree: tree of the outputs.
      varies: for each variable, whether it depends on the inputs.
      replaced: variables that hold the sum which they are an operand of, because the other operand is constant.
    """

    avals: list[Any] = dataclasses.field(default_factory=list)
    nodes: list[Node] = dataclasses.field(default_factory=list)
    regions: list[Region] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    params: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    output_paths: tuple[str, ...] = ()
    output_tree: Any = None
    varies: list[bool] = dataclasses.field(default_factory=list)
    replaced: set[int] = dataclasses.field(default_factory=set)

    def shape(self, variable: int) -> tuple[int, ...]:
        """Return the shape of a variable."""
        return self.avals[variable].shape

    def add(self, aval: Any) -> int:
        """Add a variable and return it."""
        self.avals.append(aval)
        return len(self.avals) - 1


def path_of(path: Any) -> str:
    """Return the path of a leaf as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def abstract(tree: Any) -> Any:
    """Return the tree with each array replaced by its shape and dtype."""
    return jax.tree.map(spec, tree)


def spec(x: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """Return the shape, or another shape, and the dtype of an array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        aval: Any = x
    else:
        aval = jax.typeof(x)
    dtype = jax.dtypes.canonicalize_dtype(aval.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(aval.shape if shape is None else shape, dtype, weak_type=aval.weak_type)


def trace(fn: Callable[..., Any], params: Any, inputs: Sequence[Any], *, unroll: bool = False) -> Graph:
    """Trace a function.

    Args:
      fn: pure function of (params, *inputs).
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      inputs: pytrees of the same.
      unroll: whether to unroll `lax.scan`, so that channels inside it can be removed.

    Returns:
      Its graph.

    Raises:
      UserError: the function has side effects.
    """
    params, inputs = abstract(params), abstract(tuple(inputs))
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    if closed.effects:
        effects = ", ".join(sorted(str(effect) for effect in closed.effects))
        raise UserError(
            "FUNCTION_IMPURE",
            f"expected a function without side effects, got one with {effects}; remove its callbacks and debug prints",
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    _check_paths([path_of(path) for path, _ in leaves])
    out_leaves, out_tree = jax.tree_util.tree_flatten_with_path(out)
    graph = Graph(
        paths=tuple(path_of(path) for path, _ in leaves),
        output_paths=tuple(path_of(path) for path, _ in out_leaves),
        output_tree=out_tree,
    )
    build = _Inliner(graph, unroll)
    args = [graph.add(var.aval) for var in closed.jaxpr.invars]
    graph.params, graph.inputs = tuple(args[: len(leaves)]), tuple(args[len(leaves) :])
    graph.outputs = tuple(build.inline(closed.jaxpr, closed.consts, args, ""))
    _find_permutations(graph)
    _drop_dead(graph)
    _mark_varying(graph)
    return graph


def _check_paths(paths: Sequence[str]) -> None:
    double = sorted(path for path in set(paths) if paths.count(path) > 1)
    if double:
        raise UserError(
            "PATHS_CLASH",
            f"expected parameters with one path each, got {double[0]!r} twice; rename a key that has a slash in it",
        )


def trace_closed(closed: Any) -> Graph:
    """Return the graph of a jaxpr whose arguments are all inputs."""
    graph = Graph()
    args = [graph.add(var.aval) for var in closed.jaxpr.invars]
    graph.inputs = tuple(args)
    graph.outputs = tuple(_Inliner(graph, False).inline(closed.jaxpr, closed.consts, args, ""))
    _find_permutations(graph)
    _drop_dead(graph)
    _mark_varying(graph)
    return graph


class _Inliner:
    def __init__(self, graph: Graph, unroll: bool) -> None:
        self._graph, self._unroll, self._in_region = graph, unroll, False
        self._jaxpr: Any = None

    def inline(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[int], where: str) -> list[int]:
        """Add the equations of a jaxpr and return the variables of its results."""
        env = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._constant(var.aval, value)

        def read(atom: Any) -> int:
            return self._constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            self._jaxpr = jaxpr
            inputs = [read(atom) for atom in eqn.invars]
            stack = str(eqn.source_info.name_stack)
            outputs = self._add(eqn, inputs, "/".join(part for part in (where, stack) if part))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, aval: Any, value: Any) -> int:
        variable = self._graph.add(aval)
        self._graph.constants[variable] = value
        return variable

    def _add(self, eqn: Any, inputs: list[int], where: str) -> list[int]:
        name, graph = eqn.primitive.name, self._graph
        if name in _CALLS or name in _REGIONS:
            body, consts = _body(eqn)
            if name in _CALLS or self._in_region:
                return self.inline(body, consts, inputs, where)
            if name.startswith("custom_vjp"):
                inputs = [self._copied(i, where) for i in inputs]
            start, jaxpr, self._in_region = len(graph.nodes), self._jaxpr, name not in _CHECKPOINTS
            outputs = self.inline(body, consts, inputs, where)
            if self._in_region:
                inside = {i for node in graph.nodes[start:] for i in node.outputs}
                whole = name.startswith("custom_vjp")
                outputs = [self._copied(i, where) if whole or i not in inside else i for i in outputs]
            self._in_region = False
            graph.regions.append(Region(eqn, jaxpr, start, len(graph.nodes), tuple(inputs), tuple(outputs)))
            return outputs
        if name == "scan" and self._unroll:
            closed = jax.make_jaxpr(_unrolled(eqn))(*(jax.ShapeDtypeStruct(*_spec(v.aval)) for v in eqn.invars))
            return self.inline(closed.jaxpr, closed.consts, inputs, where)
        params = dict(eqn.params)
        if name == "reshape" and params["dimensions"] is not None:
            inputs, params["dimensions"] = [self._transposed(inputs[0], params["dimensions"], where)], None
        if name == "reshape":
            between = _refined(graph.shape(inputs[0]), params["new_sizes"])
            if between is not None:
                out = graph.add(jax.core.ShapedArray(between, graph.avals[inputs[0]].dtype))
                first = {**params, "new_sizes": between}
                graph.nodes.append(Node(eqn.primitive, first, (inputs[0],), (out,), where))
                inputs = [out]
        outputs = [graph.add(var.aval) for var in eqn.outvars]
        call = as_function(eqn, self._jaxpr) if any(True for _ in core.jaxprs_in_params(eqn.params)) else None
        graph.nodes.append(Node(eqn.primitive, params, tuple(inputs), tuple(outputs), where, call))
        return outputs

    def _copied(self, variable: int, where: str) -> int:
        """Add a copy of a variable that is held whole along each axis, as a region's operands and results are."""
        graph = self._graph
        out = graph.add(graph.avals[variable])
        graph.nodes.append(Node(Spread, {}, (variable,), (out,), where))
        return out

    def _transposed(self, variable: int, permutation: Sequence[int], where: str) -> int:
        """Add a transpose, which a reshape may begin with."""
        graph = self._graph
        aval = graph.avals[variable]
        out = graph.add(jax.core.ShapedArray(tuple(aval.shape[axis] for axis in permutation), aval.dtype))
        params = {"permutation": tuple(permutation)}
        graph.nodes.append(Node(jax.lax.transpose_p, params, (variable,), (out,), where))
        return out


def _refined(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return a shape between two, so that a reshape first only splits axes and then only merges them.

    None if there is none, or if it is one of both.
    """
    if 0 in before:
        return None
    ends = sorted({int(x) for shape in (before, after) for x in np.cumprod([1, *reversed(shape)])})
    if any(large % small for small, large in itertools.pairwise(ends)):
        return None
    between = tuple(large // small for small, large in reversed(list(itertools.pairwise(ends))))
    plain = [tuple(n for n in shape if n > 1) for shape in (before, after)]
    return None if between in plain else between


def as_function(eqn: Any, jaxpr: Any) -> Callable[..., list[Any]]:
    """Return an equation of a jaxpr as a function of its operands."""
    places = {var: k for k, var in enumerate(eqn.invars) if not isinstance(var, core.Literal)}
    alone = jaxpr.replace(constvars=[], invars=list(places), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
    return lambda *operands: list(run(*(operands[k] for k in places.values())))


def _spec(aval: Any) -> tuple[tuple[int, ...], Any]:
    return aval.shape, aval.dtype


def _body(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """Return the jaxpr and the constants of a call's body."""
    for value in eqn.params.values():
        if isinstance(value, core.ClosedJaxpr):
            return value.jaxpr, value.consts
        if isinstance(value, core.Jaxpr):
            return value, ()
    raise AssertionError(f"a call of {eqn.primitive.name} without a body")


def _unrolled(eqn: Any) -> Callable[..., Any]:
    """Return a `scan` as a function that repeats its body."""
    params, closed = eqn.params, eqn.params["jaxpr"]
    body, order = core.jaxpr_as_fun(closed), range(params["length"])
    # what is carried has the body's shapes; what is scanned has one axis more
    carried = sum(
        len(a.aval.shape) == len(b.aval.shape) for a, b in zip(eqn.outvars, closed.jaxpr.outvars, strict=True)
    )
    second = sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(eqn.invars, closed.jaxpr.invars, strict=True))
    first = second - carried

    def run(*args: Any) -> list[Any]:
        carry, rows = list(args[first:second]), []
        for i in reversed(order) if params["reverse"] else order:
            out = body(*args[:first], *carry, *(jax.lax.index_in_dim(x, i, 0, keepdims=False) for x in args[second:]))
            carry = list(out[:carried])
            rows.append(out[carried:])
        if params["reverse"]:
            rows.reverse()
        return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]

    return run


def _drop_dead(graph: Graph) -> None:
    """Remove the nodes whose results no output reads."""
    read = set(graph.outputs)
    keep = [False] * len(graph.nodes)
    for place in reversed(range(len(graph.nodes))):
        node = graph.nodes[place]
        if any(i in read for i in node.outputs):
            keep[place] = True
            read.update(node.inputs)
    new_place = np.concatenate([[0], np.cumsum(keep)])
    graph.nodes = [node for node, kept in zip(graph.nodes, keep, strict=True) if kept]
    graph.regions = [
        dataclasses.replace(region, start=int(new_place[region.start]), stop=int(new_place[region.stop]))
        for region in graph.regions
    ]


def _mark_varying(graph: Graph) -> None:
    graph.varies = [False] * len(graph.avals)
    for variable in graph.inputs:
        graph.varies[variable] = True
    for node in graph.nodes:
        if any(graph.varies[i] for i in node.inputs):
            for variable in node.outputs:
                graph.varies[variable] = True


class Spread:
    """Pseudo-primitive: the operand, with no axis held once."""

    name = "spread"

    @staticmethod
    def bind(x: Any) -> Any:
        """Return the operand."""
        return x


class Permutation:
    """Pseudo-primitive: out[..., i, ...] = x[..., order[i], ...] along one axis."""

    name = "permutation"

    @staticmethod
    def bind(x: Any, *, axis: int, order: np.ndarray) -> Any:
        """Permute the axis."""
        return jnp.take(x, order, axis)


def _find_permutations(graph: Graph) -> None:
    """Replace reshape, transpose, reshape by one permutation where it is one, as in a channel shuffle.

    The first two equations remain for other readers; without one they are not evaluated.
    """
    made_by = {variable: node for node in graph.nodes for variable in node.outputs}
    regions_of: dict[Node, list[Region]] = {}
    for region in graph.regions:
        for node in graph.nodes[region.start : region.stop]:
            regions_of.setdefault(node, []).append(region)
    for place, last in enumerate(graph.nodes):
        if last.name != "reshape":
            continue
        middle = made_by.get(last.inputs[0])
        first = made_by.get(middle.inputs[0]) if middle is not None and middle.name == "transpose" else None
        if first is None or middle is None or first.name != "reshape":
            continue
        if regions_of.get(first) != regions_of.get(last):
            continue
        shape = graph.shape(first.inputs[0])
        if graph.shape(last.outputs[0]) != shape:
            continue
        found = _permutation(shape, graph.shape(first.outputs[0]), middle.params["permutation"])
        if found is not None:
            axis, order = found
            graph.nodes[place] = Node(
                Permutation, {"axis": axis, "order": order}, (first.inputs[0],), last.outputs, last.where
            )


def _permutation(
    shape: tuple[int, ...], parts: tuple[int, ...], permutation: Sequence[int]
) -> tuple[int, np.ndarray] | None:
    """Return (axis, order) if splitting one axis into parts, transposing them and merging again permutes that axis."""
    extra = len(parts) - len(shape)
    for axis in range(len(shape)):
        block = range(axis, axis + extra + 1)
        outside = [i for i in range(len(parts)) if i not in block]
        if extra < 1 or (*parts[:axis], *parts[axis + extra + 1 :]) != (*shape[:axis], *shape[axis + 1 :]):
            continue
        if all(permutation[i] == i for i in outside) and sorted(permutation[i] for i in block) == list(block):
            sizes = [parts[i] for i in block]
            order = np.arange(shape[axis]).reshape(sizes).transpose([permutation[i] - axis for i in block])
            return axis, order.reshape(-1)
    return None
