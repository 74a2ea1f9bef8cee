"""The models of jaxnn (flax.nnx)."""

import functools
import sys

from benchmarks.zoo import torchvision_models
from benchmarks.zoo.case import Case, load

NAMES = """
    resnet10t resnetblur18 resnet50_gn seresnext26d_32x4d ecaresnet26t vit_tiny_patch16_224 resnetaa34d seresnet18
    resnet18d resnetrs50 resnext50_32x4d resnet50s ecaresnet50d_pruned resnet18 resnetblur50
""".split()
BIG = """
    resnet14t resnet26t resnet50 resnetaa50 ecaresnetlight wide_resnet50_2 seresnextaa101d_32x8d senet154
""".split()


def build(name):
    """Return one of jaxnn's models as a function of its state."""
    torchvision_models.prepare()
    jaxnn = load("jaxnn")
    from flax import nnx

    options = {"img_size": 64} if "vit" in name else {}
    # it checks its input's size by checkify, a side effect that JAX does not trace
    sys.modules["jaxnn.layers.patch_embed"]._assert = lambda *_: None
    model = jaxnn.create_model(name, pretrained=False, num_classes=10, rngs=nnx.Rngs(0), **options)
    model.eval()
    graph, params, others = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)

    def fn(params, images):
        return nnx.merge(graph, params, others, copy=True)(images)

    return fn, nnx.to_pure_dict(params)


def cases():
    """Return jaxnn's families."""
    return [Case("jaxnn", name, functools.partial(build, name), big=name in BIG) for name in NAMES + BIG]
