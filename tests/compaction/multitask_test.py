"""Compaction of multi-task models: the outputs stay, and nothing that is not needed is left."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtl_sparse.compaction import exactness
from mtl_sparse.compaction.liveness import Costs, choose_ranges
from mtl_sparse.models import multitask, resnet, widths
from mtl_sparse.sparsity import stats
from mtl_sparse.sparsity.compact import compact
from tests.conftest import raises

SIZE = (32, 48)
HEADS = (("segmentation", "deeplab", 5), ("depth", "deeplab", 1), ("attribute:Male", "classifier", 1))


@functools.cache
def dense(depth, dtype="float32", attach=(), stem="deep"):
    """A small dense model with BatchNorm statistics like a trained one's: (model, flat parameters, statistics)."""
    model = multitask.MultiTaskModel(
        HEADS, depth=depth, width=8, stem=stem, head_features=6, attach=attach, dtype=jnp.dtype(dtype)
    )
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    rng = np.random.default_rng(1)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    statistics = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    for path, leaf in params.items():
        new = np.array(leaf, dtype)
        if path.endswith("scale"):
            new = rng.uniform(0.5, 1.5, leaf.shape)
        elif path.endswith("bias"):
            new = rng.normal(0, 0.3, leaf.shape)
        params[path] = new.astype(dtype)
    for path, leaf in statistics.items():
        new = rng.uniform(0.5, 2, leaf.shape) if path.endswith("var") else rng.normal(0, 0.3, leaf.shape)
        statistics[path] = new.astype(dtype)
    return model, params, statistics


def with_zeros(depth, seed, share, scope="backbone", dead=(), dtype="float32", attach=(), stem="deep"):
    """The model with random groups zero: a fraction `share` of each kernel, or all where `dead` matches its path."""
    model, params, statistics = dense(depth, dtype, attach, stem)
    rng = np.random.default_rng(seed)
    params = dict(params)
    for path, kernel in params.items():
        if kernel.ndim != 4 or not (scope == "all" or path.startswith("backbone")):
            continue
        zero = rng.random(kernel.shape[2]) < (share if share is not None else rng.choice([0, 0.3, 0.7, 0.95, 1]))
        if any(part in path for part in dead):
            zero[:] = True
        params[path] = np.where(zero[:, None], 0, kernel).astype(kernel.dtype)
    nest = functools.partial(traverse_util.unflatten_dict, sep="/")
    return model, {"params": nest(params), "batch_stats": nest(statistics)}


def outputs(model, variables, size=SIZE, dtype=np.float32):
    images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(dtype)
    return jax.jit(model.apply)(variables, images)


def assert_same_outputs(model, variables, new_model, new_variables, tolerance, size=SIZE, dtype=np.float32):
    expected = outputs(model, variables, size, dtype)
    actual = outputs(new_model, new_variables, size, dtype)
    assert {raw.dtype for raw in actual.values()} == {np.dtype(dtype)}
    for task, raw in expected.items():
        # A single logit may be near 0 by chance; the rounding error of its sum is no smaller for that.
        scale = max(float(np.abs(raw).max()), 1.0 if raw.ndim < 3 else 0.0)
        np.testing.assert_allclose(actual[task], raw, atol=tolerance * scale, rtol=0, err_msg=task)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


DEAD = st.lists(
    st.sampled_from(
        ["stem_conv1", "stem_conv2", "stem_conv3", "layer1_0/", "layer2_0/conv1", "layer2_0/downsample", "layer3"]
        + ["layer3_1/conv2", "layer4", "layer4_0/downsample", "layer4_1/conv1", "head_depth/aspp", "head_depth/pool"]
        + ["head_depth/project", "head_depth/conv", "head_depth/out", "aspp2", "Male/conv", "layer", "backbone", "head"]
        + [""]
    ),
    max_size=3,
)


DEPTH = {"depth": st.sampled_from([18, 50])}
CASES = dict(
    **DEPTH,
    seed=st.integers(0, 2**16),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 1.0, None]),
    scope=st.sampled_from(["backbone", "all"]),
    dead=DEAD,
    multiple=st.sampled_from([1, 4]),
    taps=st.booleans(),
    # Where the heads read, modulo the number of points; () is the end.
    attach=st.one_of(st.just(()), st.tuples(*[st.integers(0, 10**6)] * len(HEADS))),
    stem=st.sampled_from(sorted(resnet.STEMS)),
)
UNHURRIED = dict(deadline=None, suppress_health_check=list(HealthCheck))


def check_outputs_and_idempotence(depth, seed, share, scope, dead, multiple, taps, attach=(), stem="deep"):
    points = resnet.points(depth)
    attach = tuple(points[place % len(points)] for place in attach)
    model, variables = with_zeros(depth, seed, share, scope, dead, attach=attach, stem=stem)
    options = {"multiple": multiple, "size": SIZE if taps else None}
    small, small_variables = compact(model, variables, **options)
    assert_same_outputs(model, variables, small, small_variables, 1e-5)
    again, again_variables = compact(small, small_variables, **options)
    assert again.widths == small.widths
    jax.tree.map(np.testing.assert_array_equal, again_variables, small_variables)
    assert widths.Widths.from_json(small.widths.to_json()) == small.widths


@settings(max_examples=1, **UNHURRIED)
@given(**CASES)
# A logit near 0.
@example(depth=18, seed=142, share=0.1, scope="backbone", dead=[], multiple=1, taps=False, attach=(), stem="deep")
@example(depth=18, seed=3, share=None, scope="all", dead=["stem"], multiple=4, taps=True, attach=(), stem="resnet_d")
@pytest.mark.slow
def test_the_outputs_stay_and_compacting_twice_changes_nothing(**case):
    check_outputs_and_idempotence(**case)


@pytest.mark.slow
@settings(max_examples=300, **UNHURRIED)
@given(**CASES)
def test_the_outputs_stay_for_many_patterns(**case):
    check_outputs_and_idempotence(**case)


@pytest.mark.parametrize(
    ("depth", "share", "scope", "dead"),
    [
        (18, 0.7, "all", []),
        pytest.param(
            50, 0.7, "backbone", ["layer2_1/conv1", "layer3_2/conv2", "layer4_1/conv3"], marks=pytest.mark.slow
        ),
        (50, 0.5, "all", ["layer3_0/downsample", "aspp1", "head_depth/conv"]),
        (18, 0.5, "backbone", ["stem_conv2", "layer3"]),
    ],
)
def test_the_outputs_stay_in_float64(depth, share, scope, dead):
    with jax.enable_x64(True):
        model, variables = with_zeros(depth, 5, share, scope, dead, "float64")
        small, small_variables = compact(model, variables, size=SIZE)
        assert {leaf.dtype for leaf in jax.tree.leaves(small_variables)} == {np.dtype("float64")}
        assert_same_outputs(model, variables, small, small_variables, 1e-10, dtype=np.float64)


NAMES = tuple(name for name, *_ in HEADS)
KEPT = dict(kept=st.sets(st.sampled_from(NAMES), min_size=1, max_size=2))


def check_kept_tasks(kept, depth, seed, share, scope, dead, multiple, taps, attach=(), stem="deep"):
    """Tasks dropped from the dense and from the compact model: outputs stay, and both are models like any other."""
    points = resnet.points(depth)
    attach = tuple(points[place % len(points)] for place in attach)
    model, variables = with_zeros(depth, seed, share, scope, dead, attach=attach, stem=stem)
    options = {"multiple": multiple, "size": SIZE if taps else None}
    every = compact(model, variables, **options)
    expected = {name: raw for name, raw in outputs(model, variables).items() if name in kept}
    for old in ((model, variables), every):
        small, small_variables = compact(*old, tasks=sorted(kept), **options)
        assert small.heads == tuple(head for head in HEADS if head[0] in kept), "in the order of the model"
        assert exactness.largest_difference(expected, outputs(small, small_variables)) < 1e-5
        assert count(small_variables) < count(every[1])
        assert len(small.widths.blocks) == len(small.clone(widths=None).layers().blocks)
        again, again_variables = compact(small, small_variables, **options)
        assert again.widths == small.widths
        jax.tree.map(np.testing.assert_array_equal, again_variables, small_variables)


def test_the_outputs_of_the_tasks_that_are_kept_stay():
    # The last head that remains reads inside a block that only the dropped head reads whole.
    kept, attach = {"depth", "segmentation"}, ("layer1_1", "layer2_0/conv1", "layer3_1")
    places = [resnet.points(18).index(point) for point in attach]
    check_kept_tasks(kept, 18, 4, 0.5, "all", [], 4, True, places, "resnet_d")


@pytest.mark.slow
@settings(max_examples=150, **UNHURRIED)
@given(**CASES, **KEPT)
def test_the_outputs_of_the_tasks_that_are_kept_stay_for_many_patterns(**case):
    check_kept_tasks(**case)


def test_what_only_dropped_heads_read_is_removed_with_them():
    model, params, statistics = dense(18)
    params, features = dict(params), params["head_depth/aspp0/kernel"].shape[2]
    for path, kernel in params.items():
        if path.startswith("head_depth") and kernel.ndim == 4 and kernel.shape[2] == features:
            params[path] = np.where(np.arange(features)[:, None] % 4 > 0, 0, kernel)
    nest = functools.partial(traverse_util.unflatten_dict, sep="/")
    free = Costs(mac=1.0, copy=0.0, split=0.0)
    variables = {"params": nest(params), "batch_stats": nest(statistics)}
    small, small_variables = compact(model, variables, tasks=["depth"], costs=free)
    _, every = compact(model, variables, costs=free)
    heads = {name: sum(leaf.size for leaf in jax.tree.leaves(every["params"][f"head_{name}"])) for name in NAMES}
    alone = count(every) - heads["segmentation"] - heads["attribute:Male"]
    conv = params["backbone/layer4_1/conv2/kernel"]
    outputs_removed = features - features // 4
    assert count(small_variables) <= alone - outputs_removed * (9 * conv.shape[2] + 2), "its filters, and its BatchNorm"
    assert small_variables["params"]["backbone"]["layer4_1"]["conv2"]["kernel"].shape[3] == features // 4
    # The same model trained without the other heads.
    only = {path: leaf for path, leaf in params.items() if not path.startswith(("head_seg", "head_att"))}
    norms = {path: leaf for path, leaf in statistics.items() if not path.startswith(("head_seg", "head_att"))}
    given = {"params": nest(only), "batch_stats": nest(norms)}
    expected, expected_variables = compact(model.clone(heads=HEADS[1:2]), given, costs=free)
    assert small.widths == expected.widths
    jax.tree.map(np.testing.assert_array_equal, small_variables, expected_variables)


@pytest.mark.parametrize("twice", [False, True])
def test_layers_after_the_last_head_that_is_kept_are_removed(twice):
    attach = ("layer4_1", "layer2_1", "layer3_0/conv1")
    given = with_zeros(18, 1, 0.3, attach=attach)
    given = compact(*given) if twice else given
    small, small_variables = compact(*given, tasks=("depth",))
    assert small.attach == small.widths.attach == ("layer2_1",) and len(small.widths.blocks) == 4
    assert not any(name.startswith(("layer3", "layer4")) for name in small_variables["params"]["backbone"])
    small, small_variables = compact(*given, tasks=("attribute:Male", "depth"))
    assert small.attach == small.widths.attach == ("layer2_1", "layer3_0/conv1"), "in the order of the model"
    assert set(small_variables["params"]["backbone"]["layer3_0"]) == {"conv1", "bn1"}
    assert small.widths.blocks[-1].shortcut == "none" and "layer3_1" not in small_variables["params"]["backbone"]


def independent_count(depth, params):
    """Parameters that a pattern without dead layers needs if every layer gathers exactly what it needs."""
    kernels = {path.removesuffix("/kernel"): kernel for path, kernel in params.items() if kernel.ndim == 4}
    wants = {path: np.any(kernel != 0, (0, 1, 3)) for path, kernel in kernels.items()}
    total = sum(leaf.size for path, leaf in params.items() if path.startswith("head_"))

    def conv(path, outputs):
        taps = kernels[path].shape[0] ** 2
        return taps * int(wants[path].sum()) * int(outputs.sum()) + 2 * int(outputs.sum())  # and BatchNorm's two

    after = np.ones(params["head_depth/aspp0/kernel"].shape[2], bool)  # the heads read every feature
    for place in reversed(resnet.places(depth)):
        path = f"backbone/{place.name}"
        last = 3 if resnet.STAGES[depth][0] else 2
        needed = after
        for i in range(last, 0, -1):
            total += conv(f"{path}/conv{i}", needed)
            needed = wants[f"{path}/conv{i}"]
        if f"{path}/downsample_conv" in wants:
            total += conv(f"{path}/downsample_conv", after)
            after = needed | wants[f"{path}/downsample_conv"]
        else:
            after = needed | after
    for i in (3, 2, 1):
        total += conv(f"backbone/stem_conv{i}", after)
        after = wants[f"backbone/stem_conv{i}"]
    return total


@pytest.mark.parametrize(
    ("depth", "share"), [(18, 0.2), (18, 0.6), (50, 0.6), pytest.param(50, 0.2, marks=pytest.mark.slow)]
)
def test_the_remaining_parameters_match_an_independent_count(depth, share):
    model, variables = with_zeros(depth, 7, share)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    assert not stats.sparsity(variables["params"]).dead_layers, "the count below is for patterns without"
    free = Costs(mac=1.0, copy=0.0, split=0.0)  # gathering costs nothing, so each layer reads only what it needs
    small, small_variables = compact(model, variables, costs=free)
    assert count(small_variables) == independent_count(depth, flat) < count(variables)
    assert stats.sparsity(small_variables["params"], "all").group == 0
    shapes = jax.eval_shape(lambda: small.init(jax.random.key(0), jnp.zeros((1, *SIZE, 3))))
    assert count(shapes) == count(small_variables)
    filled, filled_variables = compact(model, variables, multiple=4)
    assert all(width % 4 == 0 for block in filled.widths.blocks for width in block.features)
    assert count(small_variables) < count(filled_variables) < count(variables)


def test_a_dead_network_is_its_constants():
    model, variables = with_zeros(50, 0, 1.0, "all")
    small, small_variables = compact(model, variables)
    assert count(small_variables) == 5 + 1 + 1, "one number for each output"
    assert set(small_variables["params"]) == {"head_segmentation", "head_depth", "head_attribute:Male"}
    assert_same_outputs(model, variables, small, small_variables, 1e-6)


def test_a_classification_head_reads_only_the_features_that_it_needs():
    """The pixel-level heads ignore some of eight features, and the classification head ignores others."""
    model, params, statistics = dense(18)
    params, features = dict(params), params["head_depth/aspp0/kernel"].shape[2]
    wanted = np.arange(features) < features // 2
    for path, kernel in params.items():
        if path.startswith("head_") and kernel.ndim == 4 and kernel.shape[2] == features:
            ignored = wanted if "attribute" in path else ~wanted & (np.arange(features) % 4 > 0)
            params[path] = np.where(ignored[:, None], 0, kernel)
    nest = functools.partial(traverse_util.unflatten_dict, sep="/")
    variables = {"params": nest(params), "batch_stats": nest(statistics)}
    small, small_variables = compact(model, variables, costs=Costs(mac=1.0, copy=0.0, split=0.0))
    new = small_variables["params"]
    assert new["head_attribute:Male"]["conv"]["kernel"].shape[2] == features - features // 2
    assert new["head_depth"]["aspp0"]["kernel"].shape[2] == features // 2 + features // 8
    assert_same_outputs(model, variables, small, small_variables, 1e-5)


def test_dead_blocks_and_branches_are_removed():
    dead = ["layer2_1/conv3", "layer3_2/conv2", "layer4_1/conv1", "layer4_0/downsample"]
    model, variables = with_zeros(50, 1, 0.3, dead=dead)
    small, small_variables = compact(model, variables)
    backbone = small_variables["params"]["backbone"]
    assert set(backbone["layer2_1"]) == set(backbone["layer3_2"]) == {"constant"}
    assert small.widths.blocks[-2].dead == 1 and "conv1" not in backbone["layer4_1"]
    assert backbone["layer4_1"]["conv2"]["kernel"].shape[2] == 1, "it reads a map of ones"
    assert "downsample_conv" not in backbone["layer4_0"] and small.widths.blocks[-3].shortcut == "constant"
    assert_same_outputs(model, variables, small, small_variables, 1e-5)


@pytest.mark.slow
def test_heads_inside_blocks_keep_what_they_read():
    """The branch of a block is dead after a head, at a head, and only a head reads it."""
    attach = ("layer4_1/conv1", "layer3_2/conv2", "layer2_1")
    dead = ["layer4_1/conv2", "layer3_2/conv1", "layer3_2/conv2"]
    model, variables = with_zeros(50, 1, 0.3, dead=dead, attach=attach)
    assert "conv2" not in variables["params"]["backbone"]["layer4_1"] and "layer4_2" not in variables["params"]
    small, small_variables = compact(model, variables)
    backbone, blocks = small_variables["params"]["backbone"], small.widths.blocks
    assert set(backbone["layer4_1"]) == {"conv1", "bn1"} and blocks[-1].shortcut == "none"
    assert blocks[9].dead == 1 and backbone["layer3_2"]["conv2"]["kernel"].shape[2] == 1, "the head reads a constant"
    check_outputs_and_idempotence(50, 1, 0.3, "backbone", dead, 4, True, [resnet.points(50).index(p) for p in attach])


@pytest.mark.slow
def test_heads_inside_blocks_that_are_dead_or_read_nothing():
    # A head reads a first convolution without live inputs, which stays for it and reads a map of ones.
    attach, dead = ("layer3_0/conv1", "layer3_2/conv1", "layer3_5"), ["layer3_0/conv1", "layer3_2/conv2"]
    model, variables = with_zeros(50, 2, 0.3, dead=dead, attach=attach)
    small, small_variables = compact(model, variables)
    assert small.widths.blocks[7].reads == () and small.widths.blocks[7].dead == 0
    assert "conv1" in small_variables["params"]["backbone"]["layer3_2"], "its head reads it, though the branch is dead"
    check_outputs_and_idempotence(50, 2, 0.3, "backbone", dead, 1, False, [resnet.points(50).index(p) for p in attach])
    # If the deeper heads read nothing, the branch ends at the last head inside it.
    attach, dead = ("layer3_0/conv2", "layer4_2", "layer4_2"), ["head_depth", "Male", "layer3_1"]
    model, variables = with_zeros(50, 3, 0.3, "all", dead, attach=attach)
    small, small_variables = compact(model, variables)
    assert (
        small.widths.blocks[7].shortcut == "none" and "conv3" not in small_variables["params"]["backbone"]["layer3_0"]
    )
    assert not any(name.startswith("layer4") for name in small_variables["params"]["backbone"])
    check_outputs_and_idempotence(50, 3, 0.3, "all", dead, 1, False, [resnet.points(50).index(p) for p in attach])


def test_nothing_remains_before_a_cut_in_the_stream():
    """If neither branch nor shortcut of a stage's first block reads its input, all layers before it are removed."""
    model, variables = with_zeros(18, 1, 0.3, dead=["layer3_0/conv1", "layer3_0/downsample"])
    small, small_variables = compact(model, variables)
    assert not any(name.startswith(("stem", "layer1", "layer2")) for name in small_variables["params"]["backbone"])
    assert_same_outputs(model, variables, small, small_variables, 1e-5)
    one, other = (outputs(small, small_variables)["depth"][i] for i in (0, 1))
    np.testing.assert_array_equal(one, other)


def test_taps_that_meet_only_padding_are_removed_and_a_larger_image_is_refused():
    model, variables = with_zeros(18, 1, 0.3)
    small, small_variables = compact(model, variables, size=(96, 128))  # features of 12x16: rates 12, 24, 36
    head = small.widths.heads[0]
    assert head.taps == ((1, 3), (1, 1), (1, 1))
    assert small_variables["params"]["head_depth"]["aspp1"]["kernel"].shape[:2] == (1, 3)
    assert_same_outputs(model, variables, small, small_variables, 1e-5, (96, 120))
    with raises("MODEL_TAPS_MISSING", naming="13x16") as caught:
        outputs(small, small_variables, (104, 128))
    assert "rate 12" in str(caught.value) and "compact.drop_taps=False" in str(caught.value)


@pytest.mark.slow
def test_a_compact_model_can_be_trained():
    model, variables = with_zeros(18, 1, 0.6, "all", ["layer3_1/conv1", "layer4_1/conv2"])
    small, small_variables = compact(model, variables, size=SIZE)
    images = jax.random.normal(jax.random.key(0), (2, *SIZE, 3))

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        given = {"params": params, "batch_stats": small_variables["batch_stats"]}
        raw, _ = small.apply(given, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return sum(jnp.mean(jnp.square(value)) for value in raw.values())

    before, gradient = jax.jit(jax.value_and_grad(loss))(small_variables["params"])
    norm = optax.tree.norm(gradient)
    assert jnp.isfinite(norm)
    assert jax.jit(loss)(jax.tree.map(lambda p, g: p - 1e-3 * g / norm, small_variables["params"], gradient)) < before


class MeanHead(nn.Module):
    """A head of another kind, which reads every feature, in the dense order."""

    outputs: int
    features: int
    dropout: float
    dtype: jnp.dtype
    axis_name: str | None
    bn_momentum: float

    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(self.outputs)(x * jnp.arange(x.shape[-1]))


def with_a_mean_head():
    """A model whose second head is a MeanHead, and its variables."""
    model, variables = with_zeros(18, 1, 0.7)
    model = model.clone(heads=(HEADS[0], ("mine", "mean", 2)))
    features = variables["params"]["head_depth"]["aspp0"]["kernel"].shape[2]
    dense_layer = {"kernel": np.random.default_rng(0).normal(size=(features, 2)).astype(np.float32), "bias": np.ones(2)}
    kept = ("backbone", "head_segmentation")
    given = {part: {name: tree for name, tree in variables[part].items() if name in kept} for part in variables}
    given["params"]["head_mine"] = {"Dense_0": dense_layer}
    return model, given


def test_a_head_of_another_kind_keeps_its_features(monkeypatch):
    monkeypatch.setitem(multitask.HEADS, "mean", MeanHead)
    model, given = with_a_mean_head()
    small, small_variables = compact(model, given)
    assert count(small_variables) < count(given)
    assert_same_outputs(model, given, small, small_variables, 1e-5)


@pytest.mark.slow
def test_a_head_of_another_kind_is_kept_or_dropped(monkeypatch):
    monkeypatch.setitem(multitask.HEADS, "mean", MeanHead)
    model, given = with_a_mean_head()
    expected = outputs(model, given)
    small, small_variables = compact(model, given, tasks=("mine",))
    assert exactness.largest_difference({"mine": expected["mine"]}, outputs(small, small_variables)) < 1e-5
    _, every = compact(model, given)
    features = given["params"]["head_mine"]["Dense_0"]["kernel"].shape[0]
    stream = small_variables["params"]["backbone"]["layer4_1"]["conv2"]["kernel"].shape[3]
    assert stream == features, "it reads every feature"
    wanted = np.arange(features) % 4 == 0
    for name in ("aspp0", "aspp1", "aspp2", "aspp3", "pool"):
        layer = given["params"]["head_segmentation"][name]
        layer["kernel"] = np.where(wanted[:, None], layer["kernel"], 0)
    expected = outputs(model, given)
    small, small_variables = compact(model, given, tasks=("segmentation",))
    assert exactness.largest_difference(outputs(small, small_variables), expected) < 1e-5
    assert "head_mine" not in small_variables["params"]
    assert small_variables["params"]["backbone"]["layer4_1"]["conv2"]["kernel"].shape[3] == features // 4
    assert every["params"]["backbone"]["layer4_1"]["conv2"]["kernel"].shape[3] == features


@settings(max_examples=2, **UNHURRIED)
@given(first=st.sampled_from([1, 4]), second=st.sampled_from([1, 4, 8]), seed=st.integers(0, 2**16), **DEPTH)
@pytest.mark.slow
def test_a_compact_model_that_lost_more_groups_is_compacted_further(depth, first, second, seed):
    model, variables = with_zeros(depth, seed, 0.5)
    small, small_variables = compact(model, variables, multiple=first)
    rng = np.random.default_rng(seed)
    fewer = jax.tree.map(
        lambda leaf: leaf * (rng.random(leaf.shape[2])[:, None] > 0.5) if leaf.ndim == 4 else leaf,
        small_variables["params"],
    )
    given = {
        "params": jax.tree.map(lambda a: a.astype(np.float32), fewer),
        "batch_stats": small_variables["batch_stats"],
    }
    again, again_variables = compact(small, given, multiple=second)
    assert_same_outputs(small, given, again, again_variables, 1e-5)
    assert second > first or count(again_variables) < count(given)


def test_ranges_are_taken_where_they_cost_least():
    costs = Costs(mac=0.01, copy=0.5, split=4.0)
    wanted = np.zeros(100, bool)
    wanted[10:30] = wanted[32:40] = wanted[80:90] = True
    assert choose_ranges(wanted, 1000, costs) == ((10, 30), (32, 40), (80, 90)), "much to save: exactly what is needed"
    assert choose_ranges(wanted, 100, costs) == ((10, 40), (80, 90)), "a gap of two costs less than one more range"
    assert choose_ranges(wanted, 10, costs) is None, "little to save: all"
    assert choose_ranges(np.ones(100, bool), 1000, costs) is None
    almost = np.arange(100) < 90
    assert choose_ranges(almost, 300, costs) is None, "a tenth less is not worth the copy of the rest"


def test_bad_input():
    model, variables = with_zeros(18, 1, 0.3)
    _, other = with_zeros(50, 1, 0.3)
    with raises("MODEL_DIFFERS", naming="backbone/layer1_0") as caught:
        compact(model, other)
    assert "absent" in str(caught.value)
    with raises("MODEL_UNSUPPORTED", naming="ResNet"):
        compact(resnet.ResNet(18), variables)
    with raises("OPTION_OUT_OF_RANGE", naming="compact.multiple=0"):
        compact(model, variables, multiple=0)
    for tasks, code, name in (
        (["depht"], "TASK_UNKNOWN", "nearest: depth"),
        (["depth", "normals"], "TASK_UNKNOWN", "segmentation, depth, attribute:Male"),
        (["depth", "depth"], "TASK_REPEATED", "'depth'"),
        ([], "OPTION_MISSING", "segmentation, depth, attribute:Male"),
        ("depth", "OPTION_TYPE", "('depth',)"),
    ):
        with raises(code, naming=name):
            compact(model, variables, tasks=tasks)
    with pytest.raises(ValueError, match="widths"):
        widths.Widths.from_json('{"stem": {}}')
