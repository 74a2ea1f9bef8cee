"""Features of EfficientNet-Lite0 by its PyTorch package, for pretrained/efficientnet_test.py.

    pip install -e '.[test,torch]' efficientnet-lite-pytorch && python -m tests.efficientnet_reference

writes data/efficientnet_reference.npz: names and shapes of the state dictionary, and features for weights drawn by
name, as published and with strides replaced by dilations after output stride 8.
"""

import json

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet

from tests.pretrained.efficientnet_test import EVERY, PATH, SIZES
from tests.pretrained.reference_test import drawn, images


def dilated(model: EfficientNet) -> EfficientNet:
    """Return the network with output stride 8: each later stride becomes a dilation of the layers after it."""
    reached, dilation = 2, 1
    for block in model._blocks:
        layer = block._depthwise_conv
        stride = layer.stride[0]
        layer.dilation = (dilation, dilation)
        if reached * stride > 8:
            layer.stride, dilation = [1, 1], dilation * stride
        else:
            reached *= stride
    return model


@torch.no_grad()
def outputs() -> dict[str, np.ndarray]:
    """Return the archive's "shapes", and "<kind>/<height>x<width>", NHWC, each `EVERY`-th channel of the last block."""
    found = {}
    for kind, change in (("published", lambda model: model), ("dilated", dilated)):
        model = change(EfficientNet.from_name("efficientnet-lite0", image_size=None)).eval()  # padded at any size
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in drawn(shapes).items()})
        found["shapes"] = np.array(json.dumps(shapes))
        for height, width in SIZES:
            features = []
            hook = model._blocks[-1].register_forward_hook(lambda *call, features=features: features.append(call[2]))
            model(torch.from_numpy(images(height, width).transpose(0, 3, 1, 2)))
            hook.remove()
            found[f"{kind}/{height}x{width}"] = features[0].numpy().transpose(0, 2, 3, 1)[..., ::EVERY]
    return found


if __name__ == "__main__":
    np.savez_compressed(PATH, **outputs())
