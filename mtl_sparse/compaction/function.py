"""Exact compaction of any pure JAX function: the same outputs from fewer parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction import graph as graph_lib
from mtl_sparse.compaction import liveness, needs, planning, plans
from mtl_sparse.compaction.carrying import Carried, alive, carry
from mtl_sparse.compaction.facts import Facts
from mtl_sparse.compaction.graph import Graph
from mtl_sparse.compaction.indices import Index, Indices, listed, restrict, tidy
from mtl_sparse.compaction.origins import Origins, fingerprint
from mtl_sparse.compaction.plans import Plan
from mtl_sparse.compaction.primitives import MOVES
from mtl_sparse.compaction.rewriting import Program
from mtl_sparse.compaction.streams import Axis, Streams
from mtl_sparse.runtime.errors import UserError

Function = Callable[..., Any]
_CONFIGURATION = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")  # of a trace


def compact(
    fn: Function,
    params: Any,
    *inputs: Any,
    multiple: int = 1,
    costs: liveness.Costs | None = None,
    unroll: bool = False,
    also: Sequence[tuple[Any, ...]] = (),
    fold: bool = True,
) -> tuple[Function, Any]:
    """Return a function with the same outputs and fewer parameters.

    Channels that zero weights make useless are removed: those that no later layer reads, and those that are constant.

    Args:
      fn: pure function of (params, *inputs), such as a Flax module's `apply`. What it computes must be finite.
      params: pytree of its parameters, as arrays.
      *inputs: example inputs, pytrees of arrays or of `jax.ShapeDtypeStruct`; only shapes and dtypes matter.
      multiple: widths are padded to a multiple of it with channels that are not needed.
      costs: costs that decide where gathering channels pays; by default as measured on a CPU.
      unroll: whether to unroll `lax.scan`, so that channels inside it can be removed.
      also: further examples of the inputs, of other sizes. Needed where the function reads more of its parameters at
        another size than at this one; otherwise the compact function raises an error there.
      fold: whether channels that are constant are removed, and the weights after them take over their effect. Such a
        plan is valid for other batch sizes, but not for another function or another size of the images. Constants are
        not used where `also` names a size at which the function has other equations.

    Returns:
      (small_fn, small_params): `small_fn(small_params, *inputs)` equals `fn(params, *inputs)` up to rounding, at other
      batch sizes as well. It can be jitted, differentiated, vmapped and exported.

    Raises:
      UserError: the function has side effects, an output depends on no input, or nothing of the function is left.
    """
    found = plan(fn, params, *inputs, multiple=multiple, costs=costs, unroll=unroll, also=also, fold=fold)
    return rewrite(fn, found, unroll=unroll), plans.apply_plan(found, params)


def plan(
    fn: Function,
    params: Any,
    *inputs: Any,
    multiple: int = 1,
    costs: liveness.Costs | None = None,
    unroll: bool = False,
    also: Sequence[tuple[Any, ...]] = (),
    fold: bool = True,
) -> Plan:
    """Return which entries of each parameter remain.

    Args:
      fn: see `compact`.
      params: see `compact`.
      *inputs: see `compact`.
      multiple: see `compact`.
      costs: see `compact`.
      unroll: see `compact`.
      also: see `compact`.
      fold: see `compact`.

    Returns:
      The plan, for `apply_plan` and `rewrite`.

    Raises:
      UserError: see `compact`.
    """
    if multiple < 1:
        raise UserError("OPTION_OUT_OF_RANGE", f"expected multiple >= 1, got multiple={multiple}")
    leaves = jax.tree_util.tree_leaves(params)
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves):
        raise UserError(
            "PARAMS_ABSTRACT",
            "expected parameters with values, got traced or abstract ones; call compact outside of jit, on the trained "
            "parameters",
        )
    graph = graph_lib.trace(fn, params, inputs, unroll=unroll)
    _check_outputs(graph)
    values = [np.asarray(jax.device_get(x)) if _is_numeric(x) else None for x in leaves]
    others = [graph_lib.trace(fn, params, more, unroll=unroll) for more in also]
    found = planning.make(graph, others, values, planning.Options(costs or liveness.Costs(), multiple, fold))
    if len(found.constant) == len(graph.outputs):
        raise UserError(
            "FUNCTION_DEAD",
            "expected a function that still depends on its inputs, got one whose zero weights make every output "
            "constant; prune less",
        )
    return found


def _is_numeric(x: Any) -> bool:
    return isinstance(getattr(x, "dtype", np.dtype(float)), np.dtype)  # not so a random key


def rewrite(fn: Function, plan: Plan, *, unroll: bool = False) -> Function:
    """Return the function of the compact parameters.

    Args:
      fn: the function that the plan was made for, or another of the same parameters, such as the same model in training
        mode. An output that has entries of removed channels, such as new BatchNorm statistics, loses them, and has the
        order of the compact parameters.
      plan: the plan.
      unroll: the value with which the plan was made.

    Returns:
      Function of (what `apply_plan` returns, *inputs). It traces `fn` once for each shape of the inputs. It raises
      UserError if the parameters are not those of the plan, or if inputs of this size need what the plan removed.
    """
    programs: dict[Any, Program] = {}

    def small_fn(params: Any, *inputs: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [graph_lib.path_of(path) for path, _ in leaves]
        plans.check_fits(plan, paths, [np.shape(x) for _, x in leaves])
        dense = [graph_lib.spec(x, plan.leaves[p].shape) for p, (_, x) in zip(paths, leaves, strict=True)]
        abstract = graph_lib.abstract(tuple(inputs))
        flat, input_tree = jax.tree_util.tree_flatten(abstract)
        options = tuple(getattr(jax.config, name) for name in _CONFIGURATION)
        key = (options, treedef, input_tree, *((x.shape, x.dtype, x.weak_type) for x in (*dense, *flat)))
        if key not in programs:
            programs[key] = _program(fn, plan, jax.tree_util.tree_unflatten(treedef, dense), abstract, unroll)
        return _call(programs[key], [x for _, x in leaves], jax.tree_util.tree_leaves(inputs))

    return small_fn


def _program(fn: Function, plan: Plan, params: Any, inputs: Sequence[Any], unroll: bool) -> Program:
    graph = graph_lib.trace(fn, params, inputs, unroll=unroll)
    _check_size(fn, graph, plan, params, inputs, unroll)
    graph.replaced = {v for path, v in zip(graph.paths, graph.params, strict=True) if plan.leaves[path].is_replaced}
    for node in graph.nodes:
        if node.name in MOVES and node.inputs[0] in graph.replaced:
            graph.replaced.update(node.outputs)
    holds = [plan.leaves[path].holds for path in graph.paths]
    carried = carry(graph, holds, [(None,) * len(graph.shape(i)) for i in graph.inputs])
    _check_origins(graph, carried, plan)
    for path, variable in zip(graph.output_paths, graph.outputs, strict=True):
        if variable in carried.failed or (carried.is_empty(variable) and 0 not in graph.shape(variable)):
            raise UserError(
                "PLAN_DIFFERS",
                f"expected a function whose outputs need no more than the plan keeps, got one whose output "
                f"{path or 'value'} needs removed channels; make a plan for this function",
            )
    return Program(graph, carried, _returned(graph, carried))


def _check_origins(graph: Graph, carried: Carried, plan: Plan) -> None:
    """Check that the function is one that the plan applies to: the same partial sums, and the same constants."""
    if plan.fingerprint and fingerprint(graph) != plan.fingerprint:
        raise UserError(
            "PLAN_DIFFERS",
            "expected the function and the input size of the plan, because the plan uses constants, got another "
            "function or another size; make the plan with fold=False, or pass inputs of this size in `also`",
        )
    origins = Origins(graph)
    is_read = alive(graph, carried, graph.outputs)
    for node, step, read in zip(graph.nodes, carried.steps, is_read, strict=True):
        partial = origins.partial(node, step) if read else ""
        if partial and partial not in plan.partial:
            raise UserError(
                "PLAN_DIFFERS",
                f"expected a function that reads removed channels only as in the plan, got one with another "
                f"{node.title}; make a plan for this function",
            )


def _returned(graph: Graph, carried: Carried) -> dict[int, Indices]:
    """Return the entries of each output: in order, or in the order of the parameters with the same entries."""
    streams = Streams(graph)
    orders: dict[Axis, list[Index]] = {}
    for variable in graph.params:
        for axis, kept in enumerate(carried.holds[variable]):
            orders.setdefault(streams.of((variable, axis)), []).append(kept)
    found = {}
    for variable in graph.outputs:
        index: list[Index] = []
        for axis, (have, size) in enumerate(zip(carried.holds[variable], graph.shape(variable), strict=True)):
            if not isinstance(have, np.ndarray):
                index.append(None)
                continue
            wanted = tidy(np.sort(have), size)
            for kept in orders.get(streams.of((variable, axis)), ()):
                if isinstance(kept, np.ndarray) and np.array_equal(np.sort(kept), listed(wanted, size)):
                    wanted = kept
                    break
            index.append(wanted)
        found[variable] = tuple(index)
    return found


def _check_size(fn: Function, graph: Graph, plan: Plan, params: Any, inputs: Sequence[Any], unroll: bool) -> None:
    """Check that no parameter is read where the plan removed it as unread."""
    if not any(leaf.unread for leaf in plan.leaves.values()):
        return
    if any(not isinstance(n, int) for x in jax.tree.leaves(inputs) for n in x.shape):  # jax.export with symbolic sizes

        def example(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return graph_lib.spec(x, tuple(n if isinstance(n, int) else 2 for n in x.shape))

        graph = graph_lib.trace(fn, params, jax.tree.map(example, inputs), unroll=unroll)
    found = needs.find(Facts(graph, None))
    for path, variable in zip(graph.paths, graph.params, strict=True):
        need = found.of[variable]
        for axis, entries in plan.leaves[path].unread.items():
            if need is not None and need[axis][entries].any():
                raise UserError(
                    "PLAN_SIZE",
                    f"expected inputs of the size that the plan was made for, got inputs that read entries of {path} "
                    "which the plan removed as unread; make the plan with inputs of this size in `also`",
                )


def _call(program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> Any:
    graph = program.graph
    arguments = list(zip((*graph.params, *graph.inputs), (*params, *inputs), strict=True))
    env = program([(variable, jnp.asarray(x)) for variable, x in arguments])
    outputs = []
    for variable in graph.outputs:
        have, shape = program.carried.holds[variable], graph.shape(variable)
        outputs.append(restrict(jnp.asarray(env[variable]), have, program.returns[variable], shape))
    return jax.tree_util.tree_unflatten(graph.output_tree, outputs)


def _check_outputs(graph: Graph) -> None:
    if graph.outputs and not any(graph.varies[variable] for variable in graph.outputs):
        raise UserError(
            "OUTPUT_CONSTANT",
            f"expected outputs that depend on the inputs, got {', '.join(graph.output_paths) or 'one'} that depend on "
            "none; pass the inputs as arguments of the function, after the parameters",
        )
