"""Which primitives a model consists of, and which operands depend on weights or inputs."""

import collections

import jax
import jax.extend.core

INLINED = "jit pjit closed_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat checkpoint remat2".split()


def inner(eqn):
    """Return the jaxpr that an inlined call consists of."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            found = eqn.params[name]
            return found.jaxpr if hasattr(found, "jaxpr") else found
    return None


def walk(jaxpr, sources, counts):
    """Count each primitive of a jaxpr with what its operands depend on.

    Args:
        jaxpr: an open jaxpr.
        sources: for each input, a text of "P" (weights) and "X" (inputs).
        counts: Counter of "primitive(operands' sources)".

    Returns:
        The sources of the outputs.
    """
    known = dict(zip(jaxpr.invars, sources, strict=True))

    def source(atom):
        return "" if isinstance(atom, jax.extend.core.Literal) else known.get(atom, "")

    for eqn in jaxpr.eqns:
        operands = [source(atom) for atom in eqn.invars]
        body = inner(eqn)
        if eqn.primitive.name in INLINED and body is not None:
            results = walk(body, operands, counts)
        else:
            counts[f"{eqn.primitive.name}({', '.join(operand or '-' for operand in operands)})"] += 1
            results = ["".join(sorted(set("".join(operands))))] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [source(atom) for atom in jaxpr.outvars]


def primitives(closed, weights):
    """Return a Counter of the primitives of a function whose first inputs are its weights."""
    counts = collections.Counter()
    walk(closed.jaxpr, ["P"] * weights + ["X"] * (len(closed.jaxpr.invars) - weights), counts)
    return counts
