"""The compact function: the equations of a graph, applied to arrays that hold fewer entries."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction import graph as graph_lib
from mtl_sparse.compaction.carrying import Carried, alive, carry
from mtl_sparse.compaction.graph import Graph, Region
from mtl_sparse.compaction.indices import UNIFORM, Indices, embed, held, restrict
from mtl_sparse.compaction.origins import summed
from mtl_sparse.runtime.errors import UserError

Env = dict[int, Any]  # variable -> array


class Program:
    """A compact function of one graph.

    Attributes:
      graph: the graph of the dense function.
      carried: its compact form.
      returns: the entries of each output that are returned.
    """

    def __init__(self, graph: Graph, carried: Carried, returns: dict[int, Indices] | None = None) -> None:
        """Create a program that computes the graph's outputs."""
        self.graph, self.carried, self.returns = graph, carried, returns or {}
        self._alive = alive(graph, carried, graph.outputs)
        self._regions: dict[int, list[Region]] = {}  # by their start, the outermost first
        for region in reversed(graph.regions):
            if region.stop > region.start:
                self._regions.setdefault(region.start, []).append(region)

    def __call__(self, arguments: Sequence[tuple[int, Any]]) -> Env:
        """Compute all variables.

        Args:
          arguments: (variable, array) of the parameters and the inputs.

        Returns:
          The arrays of the variables that the outputs read.
        """
        env: Env = dict(self.graph.constants)
        env.update(arguments)
        self._run(0, len(self.graph.nodes), env, None)
        return env

    def _run(self, start: int, stop: int, env: Env, within: Region | None) -> None:
        place = start
        while place < stop:
            region = self._next(place, within)
            if region is not None:
                self._run_region(region, env)
                place = region.stop
                continue
            if self._alive[place]:
                self._step(place, env)
            place += 1

    def _next(self, place: int, within: Region | None) -> Region | None:
        """Return the outermost region that starts at a place inside another region."""
        regions = self._regions.get(place, [])
        if within in regions:
            regions = regions[regions.index(within) + 1 :]
        return regions[0] if regions else None

    def _step(self, place: int, env: Env) -> None:
        node, step = self.graph.nodes[place], self.carried.steps[place]
        assert step is not None
        operands = [
            self._operand(env, variable, target) for variable, target in zip(node.inputs, step.targets, strict=True)
        ]
        env.update(zip(node.outputs, step.emit(operands), strict=True))

    def _operand(self, env: Env, variable: int, target: Indices) -> Any:
        shape = self.graph.shape(variable)
        sizes = [held(index, n) for index, n in zip(target, shape, strict=True)]
        if 0 in sizes:  # nothing is read of it
            return jnp.zeros(sizes, self.graph.avals[variable].dtype)
        return restrict(env[variable], self.carried.holds[variable], target, shape)

    def _run_region(self, region: Region, env: Env) -> None:
        inside = self._alive[region.start : region.stop]
        outputs = [i for i in dict.fromkeys(region.outputs) if i not in env]
        made = {i for place in range(region.start, region.stop) for i in self.graph.nodes[place].outputs}
        outputs = [i for i in outputs if i in made]
        if not any(inside):
            return
        read = _read_inside(self.graph, region)
        inputs = [
            i
            for i in dict.fromkeys(region.inputs)
            if i in env and i not in self.graph.constants and (i in read or self._is_whole(i))
        ]

        def body(*arrays: Any) -> list[Any]:
            local = dict(self.graph.constants)
            local.update({i: env[i] for i in region.inputs if i in self.graph.constants})
            local.update(zip(inputs, arrays, strict=True))
            self._run(region.start, region.stop, local, region)
            return [local[i] for i in outputs if i in local]

        outputs = [i for i in outputs if self._is_made(i, region)]
        call = self._differentiable(region, body, inputs, outputs)
        env.update(zip(outputs, call(*(env[i] for i in inputs)), strict=True))

    def _is_whole(self, variable: int) -> bool:
        """Return whether all entries of a variable are held."""
        return all(not isinstance(index, np.ndarray) for index in self.carried.holds[variable])

    def _is_made(self, variable: int, region: Region) -> bool:
        return any(
            self._alive[place] and variable in self.graph.nodes[place].outputs
            for place in range(region.start, region.stop)
        )

    def _differentiable(
        self, region: Region, body: Callable[..., list[Any]], inputs: list[int], outputs: list[int]
    ) -> Callable[..., list[Any]]:
        """Return the body of a region, with the derivatives of the region."""
        name = region.eqn.primitive.name
        if name in ("checkpoint", "remat2"):
            options = {key: region.eqn.params[key] for key in ("prevent_cse", "policy")}
            return jax.checkpoint(body, **options)
        derivative = _Derivative(self, region, inputs, outputs)
        if name == "custom_jvp_call":
            forward = jax.custom_jvp(body)
            forward.defjvp(lambda primals, tangents: derivative.jvp(body, primals, tangents))
            return forward
        reverse = jax.custom_vjp(body)
        reverse.defvjp(lambda *xs: (body(*xs), xs), derivative.vjp)
        return reverse


class _Derivative:
    """The derivative of a region: that of the dense call, traced and carried as the function itself is."""

    def __init__(self, program: Program, region: Region, inputs: list[int], outputs: list[int]) -> None:
        self._program, self._region, self._inputs, self._outputs = program, region, inputs, outputs
        known = {*inputs, *program.graph.constants, *region.outputs, *_read_inside(program.graph, region)}
        self._unread = [i for i in dict.fromkeys(region.inputs) if i not in known]  # only the derivative may read them
        self._values: dict[int, Any] = {}  # of those, while the derivative is traced

    def _dense(self, arrays: Sequence[Any]) -> list[Any]:
        """Call the region as it was, on the operands that are inputs, and return its outputs."""
        program, region = self._program, self._region
        given = dict(zip(self._inputs, arrays, strict=True))
        operands = []
        for variable in region.inputs:
            if variable in given:
                operands.append(given[variable])
            elif variable in program.graph.constants:
                operands.append(program.graph.constants[variable])
            elif variable in self._values:
                operands.append(self._values[variable])
            else:  # nothing is read of it
                aval = program.graph.avals[variable]
                operands.append(jnp.zeros(aval.shape, aval.dtype))
        call = graph_lib.as_function(region.eqn, region.jaxpr)
        by_variable = dict(zip(region.outputs, call(*operands), strict=True))
        return [by_variable[i] for i in self._outputs]

    def _holds(self, variables: Sequence[int]) -> list[Indices]:
        return [self._program.carried.holds[i] for i in variables]

    def _is_inexact(self, variable: int) -> bool:
        return bool(jnp.issubdtype(self._program.graph.avals[variable].dtype, jnp.inexact))

    def _split(self) -> tuple[list[int], list[int]]:
        """Return the places of the inputs that have derivatives, and of the others."""
        inexact = [self._is_inexact(i) for i in self._inputs]
        places = range(len(self._inputs))
        return [k for k in places if inexact[k]], [k for k in places if not inexact[k]]

    def _apply(
        self, function: Callable[..., Any], variables: Sequence[int], arrays: Sequence[Any]
    ) -> tuple[list[Any], list[Indices]]:
        """Apply a function of dense arrays to compact ones; return the results and what they hold."""
        program = self._program
        avals = [program.graph.avals[i] for i in (*variables, *self._unread)]

        def traced(*args: Any) -> list[Any]:
            self._values = dict(zip(self._unread, args[len(variables) :], strict=True))
            return function(*args[: len(variables)])

        graph = graph_lib.trace_closed(jax.make_jaxpr(traced)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)))
        unread, graph.inputs = set(graph.inputs[len(variables) :]), graph.inputs[: len(variables)]
        if unread & {*graph.outputs, *(i for node in graph.nodes for i in node.inputs)}:
            raise UserError(
                "GRADIENT_UNKNOWN",
                f"expected a derivative of {self._region.eqn.primitive.name} that reads only what the function itself "
                "reads, got one that also reads another operand; compact the model after its last training step",
            )
        carried = carry(graph, (), self._holds(variables))
        run = Program(graph, carried)
        env = run(list(zip(graph.inputs, arrays, strict=True)))
        sums = [
            step.targets[k][axis] is None
            for node, step in zip(graph.nodes, carried.steps, strict=True)
            if step is not None and node.name == "reduce_sum"
            for k, axis in summed(node)
        ]
        if any(i not in env for i in graph.outputs) or not all(sums):
            raise UserError(
                "GRADIENT_UNKNOWN",
                f"expected a derivative of {self._region.eqn.primitive.name} that needs only what the function itself "
                "needs, got one that needs removed channels; compact the model after its last training step",
            )
        return [env[i] for i in graph.outputs], [carried.holds[i] for i in graph.outputs]

    def jvp(self, body: Callable[..., list[Any]], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        """Return the outputs and their tangents."""
        smooth, other = self._split()
        variables = [self._inputs[k] for k in (*smooth, *other, *smooth)]
        arrays = [primals[k] for k in (*smooth, *other)] + [tangents[k] for k in smooth]

        def dense(*args: Any) -> list[Any]:
            fixed, moving = args[len(smooth) : len(primals)], args[: len(smooth)]

            def call(*xs: Any) -> list[Any]:
                every = dict(zip((*smooth, *other), (*xs, *fixed), strict=True))
                return self._dense([every[k] for k in range(len(primals))])

            return jax.jvp(call, moving, args[len(primals) :])[1]

        found, holds = self._apply(dense, variables, arrays)
        shapes = [self._program.graph.shape(i) for i in self._outputs]
        results = [
            embed(x, mine, want, shape)
            for x, mine, want, shape in zip(found, holds, self._holds(self._outputs), shapes, strict=True)
        ]
        return body(*primals), results

    def vjp(self, primals: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        """Return the cotangents of the inputs."""
        smooth, other = self._split()
        outputs = [k for k, i in enumerate(self._outputs) if self._is_inexact(i)]
        variables = [self._inputs[k] for k in (*smooth, *other)] + [self._outputs[k] for k in outputs]
        holds_out = self._holds(self._outputs)
        scaled = [cotangents[k] / _repeats(holds_out[k], self._program.graph.shape(self._outputs[k])) for k in outputs]
        arrays = [primals[k] for k in (*smooth, *other)] + scaled

        def dense(*args: Any) -> list[Any]:
            fixed = args[len(smooth) : len(primals)]

            def call(*xs: Any) -> list[Any]:
                every = dict(zip((*smooth, *other), (*xs, *fixed), strict=True))
                found = self._dense([every[k] for k in range(len(primals))])
                return [found[k] for k in outputs]

            return list(jax.vjp(call, *args[: len(smooth)])[1](list(args[len(primals) :])))

        found, holds = self._apply(dense, variables, arrays)
        result: list[Any] = [None] * len(primals)
        for k, x, mine in zip(smooth, found, holds, strict=True):
            variable = self._inputs[k]
            want, shape = self._program.carried.holds[variable], self._program.graph.shape(variable)
            result[k] = embed(x, mine, want, shape, total=True).astype(primals[k].dtype)
        return tuple(result)


def _read_inside(graph: Graph, region: Region) -> set[int]:
    """Return the variables that the equations of a region read."""
    return {i for node in graph.nodes[region.start : region.stop] for i in node.inputs}


def _repeats(holds: Indices, shape: Sequence[int]) -> int:
    """Return how often an array is repeated along its uniform axes."""
    return int(np.prod([n for index, n in zip(holds, shape, strict=True) if index is UNIFORM], initial=1))
