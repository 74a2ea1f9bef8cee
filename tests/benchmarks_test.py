"""The benchmarks on something small: that they measure what they say, not how fast it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compact, fixed_norm, prox
from mtl_sparse.benchmark import timed


def test_every_operator_prunes_about_half(capsys):
    functions = prox.operators([(1, 1, 64, 8), (3, 3, 32, 4)])
    for name, function in functions.items():
        if name.startswith(("copy", "pass")):
            continue
        zero = np.concatenate([np.ravel(x == 0) for x in function()])
        assert 0.3 < zero.mean() < 0.7, name
        assert all(jnp.isfinite(x).all() for x in function()), name
    seconds = timed(functions, rounds=2)
    assert all(values.shape == (2,) and (values > 0).all() for values in seconds.values())
    prox.report(seconds, "copy of the three arrays")
    assert capsys.readouterr().out.splitlines()[1].split()[-4:] == ["1.00", "1.00", "..", "1.00"]


@pytest.mark.slow
def test_fixed_norm_probe_and_figure(config):
    config.sparsity.update(lambda_=1.0, warmup_steps=0)
    found = {}
    for variant in ("default", "norm_and_revival_free"):
        config.sparsity.update(fixed_norm.VARIANTS[variant][0])
        found["rooms", 1.0, variant] = fixed_norm.measure(config)
    (held,), (free,) = (values["rows"] for values in found.values())
    assert held["step"] == free["step"] == 4
    np.testing.assert_allclose(held["norm"][1:], [1, 1], rtol=1e-4)
    assert free["norm"][1] < 0.99
    assert 0 < held["zero"] < 1
    found["rooms", 1.0, "revival_free"] = found["rooms", 1.0, "default"]
    figure = fixed_norm.draw(found)
    assert [len(axis.lines) for axis in figure.axes] == [3, 3, 3, 4]


def test_compaction_is_timed_for_each_share():
    lines = compact.patterns(32, 1, rounds=2, shares=(0.6,), depth=18, width=8).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["dense", "compact", "multiple of 4", "4, no gather"]
    ratios = [float(line.split("|")[5].strip()[:-1]) for line in lines[2:]]
    assert ratios[0] == 1 < ratios[3] < ratios[1]
    assert compact.costs(2).mac > 0
