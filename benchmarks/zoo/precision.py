"""A function traced in float32, computed in float64, with convolutions that are fast in float64."""

import itertools

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


def evaluate(jaxpr, consts, arguments, rules=None):
    """Evaluate a jaxpr: in float64, or, if there are `rules`, as it is.

    Args:
        jaxpr: an open jaxpr.
        consts: its constants.
        arguments: its inputs.
        rules: functions to call in place of primitives, by name.
    """
    keep = wide if rules is None else jnp.asarray
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(keep, consts), *arguments), strict=True))

    def read(atom):
        if not isinstance(atom, jax.extend.core.Literal):
            return env[atom]
        return keep(np.asarray(atom.val, atom.aval.dtype))

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        body = inner(eqn)
        if eqn.primitive.name in INLINED and body is not None:
            closed = [part for part in eqn.params.values() if isinstance(part, jax.extend.core.ClosedJaxpr)]
            results = evaluate(body, closed[0].consts if closed else [], operands, rules)
        elif eqn.primitive.name == "scan":
            results = scanned(eqn.params, operands, rules)
        else:
            params = {name: widened(value) for name, value in eqn.params.items()} if rules is None else eqn.params
            results = (rules or {}).get(eqn.primitive.name, eqn.primitive.bind)(*operands, **params)
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def scanned(params, operands, rules):
    """Evaluate lax.scan, see `evaluate`."""
    consts, carried, body = params["num_consts"], params["num_consts"] + params["num_carry"], params["jaxpr"]

    def step(carry, slices):
        found = evaluate(body.jaxpr, body.consts, [*operands[:consts], *carry, *slices], rules)
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


def convolution(lhs, rhs, *, dimension_numbers, window_strides, padding, rhs_dilation, feature_group_count, **params):
    """Return a convolution in float64 as a sum of matrix products, one for each position in the kernel.

    XLA computes convolutions in float64 on a CPU by a slow loop, depthwise ones as if they were dense.
    """
    plain = params["batch_group_count"] == 1 and set(params["lhs_dilation"]) <= {1}
    if not plain or lhs.dtype != np.float64:
        return jax.lax.conv_general_dilated_p.bind(
            lhs, rhs, dimension_numbers=dimension_numbers, window_strides=window_strides, padding=padding,
            rhs_dilation=rhs_dilation, feature_group_count=feature_group_count, **params,
        )  # fmt: skip
    from_images, from_kernel = dimension_numbers.lhs_spec, dimension_numbers.rhs_spec  # where each axis is
    x = jnp.transpose(lhs, (from_images[0], *from_images[2:], from_images[1]))  # [N, ..., C]
    kernel = jnp.transpose(rhs, (*from_kernel[2:], from_kernel[1], from_kernel[0]))  # [..., I, O]
    groups = feature_group_count
    x = jax.lax.pad(x, np.float64(0), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    sizes, inputs, outputs = kernel.shape[:-2], kernel.shape[-2], kernel.shape[-1]
    reach = [(size - 1) * rate + 1 for size, rate in zip(sizes, rhs_dilation, strict=True)]
    ends = [length - one for length, one in zip(x.shape[1:-1], reach, strict=True)]  # of the first row or column read
    total = 0
    for tap in itertools.product(*map(range, sizes)):
        starts = [index * rate for index, rate in zip(tap, rhs_dilation, strict=True)]
        part = x[
            (slice(None), *map(slice, starts, [a + b + 1 for a, b in zip(starts, ends, strict=True)], window_strides))
        ]
        weights = kernel[tap].reshape(inputs, groups, outputs // groups)
        if inputs == 1:
            total += (part[..., None] * weights[0]).reshape(*part.shape[:-1], outputs)
        else:
            part = part.reshape(*part.shape[:-1], groups, inputs)
            total += jnp.einsum("...gi,igo->...go", part, weights).reshape(*part.shape[:-2], outputs)
    to_output = dimension_numbers.out_spec
    return jnp.transpose(total, np.argsort((to_output[0], *to_output[2:], to_output[1])))


def fast(fn):
    """Return `fn(params, images)` with `convolution` in place of XLA's in float64; the same equations otherwise."""

    def computed(params, images):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, images)
        leaves = jax.tree.leaves((params, images))
        found = evaluate(closed.jaxpr, closed.consts, leaves, {"conv_general_dilated": convolution})
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return computed
