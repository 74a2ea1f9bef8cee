"""A function traced in float32, computed in float64."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.primitives import INLINED, inner


def widened(value):
    """Return a value of an equation's parameters with float64 in place of float32."""
    if isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
        return value
    try:
        return np.dtype("float64") if value is not None and np.dtype(value) == np.float32 else value
    except TypeError:
        return value


def wide(x):
    """Return an array in float64 if it is in float32."""
    return jnp.asarray(x, jnp.float64) if getattr(x, "dtype", None) == np.float32 else x


def evaluate(jaxpr, consts, arguments):
    """Evaluate a jaxpr in float64."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(wide, consts), *arguments), strict=True))

    def read(atom):
        if not isinstance(atom, jax.extend.core.Literal):
            return env[atom]
        return wide(np.asarray(atom.val, atom.aval.dtype))

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        body = inner(eqn)
        if eqn.primitive.name in INLINED and body is not None:
            closed = [part for part in eqn.params.values() if isinstance(part, jax.extend.core.ClosedJaxpr)]
            results = evaluate(body, closed[0].consts if closed else [], operands)
        elif eqn.primitive.name == "scan":
            results = scanned(eqn.params, operands)
        else:
            params = {name: widened(value) for name, value in eqn.params.items()}
            results = eqn.primitive.bind(*operands, **params)
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def scanned(params, operands):
    """Evaluate lax.scan in float64."""
    consts, carried, body = params["num_consts"], params["num_consts"] + params["num_carry"], params["jaxpr"]

    def step(carry, slices):
        found = evaluate(body.jaxpr, body.consts, [*operands[:consts], *carry, *slices])
        return found[: params["num_carry"]], found[params["num_carry"] :]

    options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    carry, stacked = jax.lax.scan(step, operands[consts:carried], operands[carried:], **options)
    return [*carry, *stacked]


def in_float64(closed):
    """Return `fn(params, images)` in float64 for the jaxpr of one in float32; needs jax_enable_x64.

    Models cast to float32 in places, so weights and images in float64 would not make them exact.
    """

    def fn(params, images):
        return evaluate(closed.jaxpr, closed.consts, [*jax.tree.leaves(params), images])

    return fn
