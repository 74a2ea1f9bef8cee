"""Features of torchvision's and timm's networks, dilated as the backbones here, for pretrained/imagenet_test.py.

    pip install -e '.[test,torch]' torchvision timm && python -m tests.imagenet_reference

writes data/imagenet_reference.npz: names and shapes of the state dictionaries, and features for weights drawn by name.
"""

import json

import numpy as np
import timm
import torch
import torchvision
from torch import nn

from tests.pretrained.imagenet_test import EVERY, PATH, SIZES
from tests.pretrained.reference_test import drawn, images


def dilated(model: nn.Module) -> nn.Module:
    """Return the network with the strides 1/2/1/1 and the dilations 1/1/2/4 in all its stages' 3x3 convolutions."""
    for stage, dilation in (("layer3", 2), ("layer4", 4)):
        for layer in getattr(model, stage).modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                if layer.kernel_size == (3, 3):
                    layer.dilation = layer.padding = (dilation, dilation)
    return model


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "resnet50": lambda: torchvision.models.resnet50(),
    # output_stride: with its 2x2 averages at stride 1
    "resnet18d": lambda: timm.create_model("resnet18d", output_stride=8),
    "resnet50d": lambda: timm.create_model("resnet50d", output_stride=8),
}


@torch.no_grad()
def outputs() -> dict[str, np.ndarray]:
    """Return the archive's "<network>/shapes", and "<network>/<height>x<width>", NHWC, each `EVERY`-th channel."""
    found = {}
    for name, make in NETWORKS.items():
        model = dilated(make()).eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in drawn(shapes).items()})
        found[f"{name}/shapes"] = np.array(json.dumps(shapes))
        for height, width in SIZES:
            features = []
            hook = model.layer4.register_forward_hook(lambda *call, features=features: features.append(call[2]))
            model(torch.from_numpy(images(height, width).transpose(0, 3, 1, 2)))
            hook.remove()
            found[f"{name}/{height}x{width}"] = features[0].numpy().transpose(0, 2, 3, 1)[..., ::EVERY]
    return found


if __name__ == "__main__":
    np.savez_compressed(PATH, **outputs())
