"""Every case of the zoo."""

from benchmarks.zoo import (
    equimo_models,
    flax_models,
    haiku_models,
    jax_resnet_models,
    jaxnn_models,
    keras_models,
    torchvision_models,
)

PACKAGES = (flax_models, jax_resnet_models, haiku_models, keras_models, equimo_models, jaxnn_models, torchvision_models)


def cases():
    """Return all cases, the packages in turn and the big ones last."""
    placed = [(case.big, place, case) for package in PACKAGES for place, case in enumerate(package.cases())]
    return [case for _, _, case in sorted(placed, key=lambda item: item[:2])]
