"""The models of torchvision, made JAX functions by torchax."""

import functools

from benchmarks.zoo.case import Case, load

SIZES = {"inception_v3": 75, "MaxVit": 128}
NAMES = """
    alexnet shufflenet_v2_x0_5 densenet121 resnet18 squeezenet1_1 mobilenet_v2 mobilenet_v3_small googlenet swin_t
    vit_b_32 MaxVit inception_v3 efficientnet_b0 regnet_y_400mf regnet_x_400mf mnasnet0_5 convnext_tiny swin_v2_t
    segmentation.deeplabv3_mobilenet_v3_large segmentation.lraspp_mobilenet_v3_large segmentation.fcn_resnet50
    resnet50 resnext50_32x4d vgg11_bn efficientnet_v2_s shufflenet_v2_x1_0 squeezenet1_0 mobilenet_v3_large
    segmentation.deeplabv3_resnet50
""".split()
BIG = """
    vgg11 vgg16_bn wide_resnet50_2 resnet34 shufflenet_v2_x2_0 efficientnet_b1 regnet_y_800mf mnasnet1_0 densenet161
    resnet101 efficientnet_b4 regnet_y_1_6gf convnext_small swin_s resnext101_32x8d
""".split()
MAXVIT = {
    "input_size": (128, 128),
    "stem_channels": 32,
    "partition_size": 4,
    "block_channels": [32, 64, 128, 256],
    "block_layers": [1, 1, 2, 1],
    "head_dim": 32,
    "stochastic_depth_prob": 0.2,
}


def prepare():
    """Let torchvision import beside PyTorch's CPU build: PyPI's torchvision has its compiled operators for CUDA only.

    Their signatures suffice, as no model here uses them.
    """
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def import_torchax():
    """Return torchax; its version 0.0.13 names overloads for named dimensions, which PyTorch 2.13 no longer has."""
    import torch

    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    def lenient(self, name):
        try:
            return original(self, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return object()

    packet.__getattr__ = lenient
    try:
        torchax = load("torchax")
        torchax.default_env()
    finally:
        packet.__getattr__ = original
    return torchax


def build(name, size):
    """Return one of torchvision's models as a function of its state."""
    prepare()
    torchax = import_torchax()
    torchvision = load("torchvision")
    module, _, function = name.rpartition(".")
    models = getattr(torchvision.models, module) if module else torchvision.models
    options = {"weights": None, "num_classes": 10}
    if module:
        options |= {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    if name.startswith("vit"):
        options |= {"image_size": size}
    if name == "MaxVit":
        options = MAXVIT | {"num_classes": 10}
    model = getattr(models, function)(**options).eval()
    params, fn = torchax.extract_jax(model)
    return lambda params, images: output(fn(params, (images,))), params


def output(result):
    """Return the main output of a model that returns several."""
    return result["out"] if isinstance(result, dict) else result


def size(name):
    """Return the smallest side that a model takes."""
    return SIZES.get(name, 64)


def cases():
    """Return torchvision's families."""
    return [
        Case(
            "torchvision",
            name,
            functools.partial(build, name, size(name)),
            (3, size(name), size(name)),
            "oi",
            name in BIG,
        )
        for name in NAMES + BIG
    ]
