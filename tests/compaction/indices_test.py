"""Index lists: entries are taken, restricted and embedded as NumPy does it."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from mtl_sparse.compaction.indices import UNIFORM, embed, lacks, meet, positions, restrict, take, tidy


def lists(size):
    return st.lists(st.sampled_from(range(size)), unique=True, max_size=size).map(lambda x: np.array(x, int))


@hypothesis.given(have=lists(30), want=lists(30), contiguous=st.booleans())
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_embedding_fills_with_zeros(have, want, contiguous):
    if contiguous:
        have, want = np.sort(have), np.sort(want)
    dense = np.zeros((2, 30, 1), np.float32)
    dense[:, have] = np.random.default_rng(0).normal(size=(2, len(have), 1))
    got = embed(dense[:, have], (None, have, None), (None, want, None), dense.shape)
    np.testing.assert_array_equal(got, dense[:, want])


@hypothesis.given(places=st.lists(st.integers(0, 19), max_size=30).map(lambda x: np.array(x, int)))
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_taking_places(places):
    x = np.arange(40.0).reshape(2, 20)
    np.testing.assert_array_equal(take(x, places, 1), x[:, places])


@hypothesis.given(one=lists(12), other=lists(12))
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_meeting_is_the_intersection(one, other):
    both = meet(one, other)
    assert set(both) == set(one) & set(other)
    x = np.arange(12.0)
    np.testing.assert_array_equal(restrict(x[one], (one,), (both,), (12,)), x[both])
    assert lacks(one, both, 12) is None
    assert (lacks(one, other, 12) is None) == (set(other) <= set(one))


def test_axes_that_are_held_once():
    x = np.ones((1, 3))
    assert meet(UNIFORM, None) is None and meet(UNIFORM, UNIFORM) is UNIFORM
    assert restrict(x, (UNIFORM, None), (None, None), (4, 3)).shape == (4, 3)
    np.testing.assert_array_equal(embed(np.ones((4, 3)), (None, None), (UNIFORM, None), (4, 3), total=True), 4 * x)
    np.testing.assert_array_equal(embed(x, (UNIFORM, None), (UNIFORM, None), (4, 3), total=True), 4 * x)
    np.testing.assert_array_equal(positions(np.array([5, 2, 6]), np.array([6, 5]), 6), [2, 0])  # 6 reads a constant 1
    assert tidy(np.arange(3), 3) is None and tidy(np.array([1, 0, 2]), 3) is not None
