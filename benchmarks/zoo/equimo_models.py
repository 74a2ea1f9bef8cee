"""The vision models of Equimo (Equinox)."""

import functools

import jax

from benchmarks.zoo import weights
from benchmarks.zoo.case import Case, key, load

NAMES = """
    mobilenetv3_small convnext_t mobilenetv3_large attnet_xxs iformer_t iformer_s lowformer_backbone_b0
    reduceformer_backbone_b1 vit_tiny_patch16_224 dinov2_vits14_reg eupe_vitt16 vit5_small
    SHViT Mlla Vssd
""".split()
SIZES = {"dinov2_vits14_reg": 56, "attnet_xxs": 128}
OPTIONS = {
    "lowformer_backbone_b0": {"attention_type": "softmax"},
    "Mlla": {"img_size": 64, "depths": [1, 1, 2, 1]},
    "Vssd": {"img_size": 64, "depths": [1, 1, 2, 1]},
}


def is_shape(leaf):
    """Return whether a leaf is a shape without values."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def build(name, size):
    """Return one of Equimo's models as a function of its arrays, one image at a time under vmap."""
    models, equinox = load("equimo.models"), load("equinox")

    options = {"img_size": size} if "vit" in name else {}
    options |= {} if name.startswith(("eupe", "dinov")) else {"num_classes": 10}
    options |= OPTIONS.get(name, {})
    create = functools.partial(getattr(models, name), in_channels=3, key=key(), **options)
    model = equinox.filter_eval_shape(create)
    if any(is_shape(leaf) and not weights.is_float(leaf) for leaf in jax.tree.leaves(model)):
        model = create()  # tables of indices, which must have values
    model = equinox.nn.inference_mode(model)
    params, static = equinox.partition(model, weights.is_float)

    def fn(params, images):
        whole = equinox.combine(params, static)
        if name == "SHViT":  # what it does after its features does not run
            return jax.vmap(lambda image: whole.head(whole.features(image, inference=True).mean((1, 2))))(images)
        return jax.vmap(lambda image: whole(image, key=key(), inference=True))(images)

    return fn, params


def cases():
    """Return Equimo's families, the smallest of each."""
    return [
        Case("equimo", name, functools.partial(build, name, size), (3, size, size), "oi")
        for name in NAMES
        for size in [OPTIONS.get(name, {}).get("img_size", SIZES.get(name, 64))]
    ]
