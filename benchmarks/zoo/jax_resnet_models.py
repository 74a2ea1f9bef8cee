"""The ResNets of jax-resnet (flax.linen)."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.zoo.case import Case, key, load

NAMES = "ResNet18 ResNeSt50 ResNeXt50 ResNetD18 ResNet50 ResNeSt50Fast ResNetD50 WideResNet50".split()
BIG = "ResNet34 ResNet101".split()


def build(name):
    """Return one of jax-resnet's models as a function of its variables."""
    model = getattr(load("jax_resnet"), name)(n_classes=10)
    variables = jax.eval_shape(model.init, key(), jnp.zeros((1, 64, 64, 3)))
    return functools.partial(model.apply, mutable=False), variables


def cases():
    """Return jax-resnet's families."""
    return [Case("jax-resnet", name, functools.partial(build, name), big=name in BIG) for name in NAMES + BIG]
