"""The published model in PyTorch, written only from its description, and its outputs for pretrained/reference_test.py.

    pip install -e '.[test,torch]' && python -m tests.torch_reference

writes data/torch_reference.npz: names and shapes of the state dictionaries, outputs for weights drawn by name, and the
losses of the first training steps from PyTorch's own initial weights; and data/torch_lomt.npz, the first two for models
whose heads read convolutions inside the backbone.
"""

import functools
import json

import numpy as np
import torch
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STRIDES_DILATIONS = ((1, 1), (2, 1), (1, 2), (1, 4))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Return a convolution without bias whose padding keeps the map's size at stride 1."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=dilation * (size // 2), dilation=dilation, bias=False)


def conv_bn_relu(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Return the three modules convolution, batch normalization and ReLU."""
    return [conv(inputs, outputs, size, stride, dilation), nn.BatchNorm2d(outputs), nn.ReLU()]


class Block(nn.Module):
    """A residual block: basic (two 3x3) or bottleneck v1.5 (1x1, 3x3 with the stride, 1x1)."""

    def __init__(self, inputs: int, features: int, stride: int, dilation: int, expansion: int) -> None:
        """Build a block of `expansion * features` outputs: basic for expansion 1, else a bottleneck."""
        super().__init__()
        outputs = expansion * features
        self.bottleneck = expansion != 1
        self.conv1 = conv(inputs, features, 1) if self.bottleneck else conv(inputs, features, 3, stride, dilation)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = conv(features, features, 3, stride if self.bottleneck else 1, dilation)
        self.bn2 = nn.BatchNorm2d(features)
        if self.bottleneck:
            self.conv3 = conv(features, outputs, 1)
            self.bn3 = nn.BatchNorm2d(outputs)
        shortcut = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
        self.downsample = nn.Sequential(*shortcut) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the branch, then apply ReLU."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(torch.relu(y)))
        return torch.relu(y + self.downsample(x))


class Backbone(nn.Module):
    """ResNet-D with a three-convolution stem and dilated last stages; output stride 8."""

    def __init__(self, depth: int, width: int) -> None:
        """Build the stem and the four stages; `width` is the stem's and first stage's base (64 in the paper)."""
        super().__init__()
        channels = 2 * width
        stem = conv_bn_relu(3, width, 3, 2) + conv_bn_relu(width, width, 3) + conv_bn_relu(width, channels, 3)
        self.stem1 = nn.Sequential(*stem)
        expansion = 1 if depth == 18 else 4
        for stage, (stride, dilation) in enumerate(STRIDES_DILATIONS):
            features = width * 2**stage
            blocks = [Block(channels, features, stride, dilation, expansion)]
            channels = expansion * features
            blocks += [Block(channels, features, 1, dilation, expansion) for _ in range(BLOCKS[depth][stage] - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, channels, ceil(H / 8), ceil(W / 8)]."""
        x = nn.functional.max_pool2d(self.stem1(x), 3, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 branch, three dilated 3x3 branches, global pooling, projection."""

    def __init__(self, inputs: int, features: int) -> None:
        """Build the five branches and the projection of their concatenation."""
        super().__init__()
        branches = [nn.Sequential(*conv_bn_relu(inputs, features, 1), nn.Dropout(0.3))]
        branches += [nn.Sequential(*conv_bn_relu(inputs, features, 3, 1, rate)) for rate in (12, 24, 36)]
        branches.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(inputs, features, 1)))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*conv_bn_relu(len(branches) * features, features, 1), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches in order (the pooled one expanded to the map's size) and project."""
        return self.project(torch.cat([branch(x).expand(-1, -1, *x.shape[2:]) for branch in self.convs], dim=1))


def deeplab_head(inputs: int, features: int, outputs: int) -> nn.Sequential:
    """Return the DeepLab-v3 head; its prediction stays at the resolution of its input."""
    return nn.Sequential(ASPP(inputs, features), *conv_bn_relu(features, features, 3), nn.Conv2d(features, outputs, 1))


class ClassifierHead(nn.Module):
    """Convolution, ReLU, max-pool, global average and two linear layers; returns logits."""

    def __init__(self, inputs: int, outputs: int, padding: int) -> None:
        """Build the head; `padding` is that of its 3x3 convolution."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, 64, 3, padding=padding)
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B], or [B, outputs] for more than one output."""
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).mean(dim=(2, 3))
        x = torch.relu(self.fc1(nn.functional.dropout(x, 0.6, self.training)))
        x = self.fc2(nn.functional.dropout(x, 0.4, self.training))
        return x[:, 0] if x.shape[1] == 1 else x


class Model(nn.Module):
    """Shared backbone with one decoder per task, with the state_dict keys of the reference implementation."""

    def __init__(self, depth: int, tasks: dict[str, tuple[str, int]], width: int = 64, head_features: int = 256,
                 classifier_padding: int = 1, single: bool = False,
                 reads: dict[str, str] | None = None) -> None:  # fmt: skip
        """Build the model; `tasks` maps a decoder name to (kind, outputs), kind 'deeplab' or 'classifier'.

        `reads` maps a decoder name to the convolution of the backbone whose output it takes; None is the end.
        """
        super().__init__()
        if single and len(tasks) != 1:
            raise ValueError("a single-task model takes exactly one task")
        self.backbone = Backbone(depth, width)
        builders = {
            "deeplab": lambda inputs, outputs: deeplab_head(inputs, head_features, outputs),
            "classifier": lambda inputs, outputs: ClassifierHead(inputs, outputs, classifier_padding),
        }
        self.reads, self.seen = reads, {}
        inputs = dict.fromkeys(tasks, self.backbone.channels)
        for task, name in (reads or {}).items():
            layer = self.backbone.get_submodule(name)
            inputs[task] = layer.out_channels
            layer.register_forward_hook(functools.partial(self._see, name))
        heads = {task: builders[kind](inputs[task], outputs) for task, (kind, outputs) in tasks.items()}
        self.tasks = tuple(heads)
        self.single = single
        self.decoders = heads[self.tasks[0]] if single else nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, 3, H, W] to each task's raw prediction (no sigmoid, tanh or softmax)."""
        end = self.backbone(images)
        features = {task: self.seen[self.reads[task]] if self.reads else end for task in self.tasks}
        return {task: (self.decoders if self.single else self.decoders[task])(features[task]) for task in self.tasks}

    def _see(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the output of a layer."""
        self.seen[name] = output.clone()


CASES = {
    # name: (depth, {decoder: (kind, outputs)}, sizes of the images)
    "18": (18, {"segmentsemantic": ("deeplab", 5), "class_male": ("classifier", 1)}, ((64, 64), (65, 77), (320, 328))),
    "50": (
        50,
        {"segmentsemantic": ("deeplab", 7), "surface_normal": ("deeplab", 3), "depth_euclidean": ("deeplab", 1)},
        ((64, 64), (65, 77)),
    ),
    "101": (101, {"edge_texture": ("deeplab", 1), "class_smile": ("classifier", 1)}, ((64, 64), (65, 77))),
    "single": (50, {"surface_normal": ("deeplab", 3)}, ((48, 56),)),
}
# The same for LOMT, with the convolution that each decoder reads: published choices, and one of another task.
LOMT_CASES = {
    "nyu": (
        50,
        {
            "segmentsemantic": ("deeplab", 7),
            "depth_euclidean": ("deeplab", 1),
            "surface_normal": ("deeplab", 3),
            "edge_texture": ("deeplab", 1),
        },
        ((64, 64), (65, 77)),
    ),
    "faces": (
        50,
        {"class_lipstick": ("classifier", 1), "class_smile": ("classifier", 1), "class_eyebrows": ("classifier", 1)},
        ((64, 64),),
    ),
    "18": (18, {"depth_euclidean": ("deeplab", 1), "edge_texture": ("deeplab", 1)}, ((65, 77),)),
}
LOMT_READS = {
    "nyu": {
        "segmentsemantic": "layer3.3.conv1",
        "depth_euclidean": "layer3.3.conv1",
        "surface_normal": "layer4.0.conv1",
        "edge_texture": "layer2.3.conv2",
    },
    "faces": {"class_lipstick": "layer3.0.conv2", "class_smile": "layer3.4.conv3", "class_eyebrows": "layer4.2.conv3"},
    "18": {"depth_euclidean": "layer3.1.conv2", "edge_texture": "layer2.0.conv1"},
}


@torch.no_grad()
def outputs(cases: dict, reads: dict) -> dict[str, np.ndarray]:
    """Return the archive's "<case>/shapes", and "<case>/<height>x<width>/<decoder>", NHWC or [B]."""
    from tests.pretrained.reference_test import drawn, images

    found = {}
    for case, (depth, tasks, sizes) in cases.items():
        model = Model(depth, tasks, width=8, head_features=16, single=case == "single", reads=reads.get(case)).eval()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict({name: torch.from_numpy(value) for name, value in drawn(shapes).items()})
        found[f"{case}/shapes"] = np.array(json.dumps(shapes))
        for height, width in sizes:
            for task, raw in model(torch.from_numpy(images(height, width).transpose(0, 3, 1, 2))).items():
                value = raw.numpy()
                key = f"{case}/{height}x{width}/{task}"
                found[key] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
    return found


def first_losses() -> dict[str, np.ndarray]:
    """Return "start/shapes", and "start/<decoder>": the loss before each of ten Adam steps on one batch [10].

    Weights start as PyTorch's default draws them, without dropout; the objective is the sum of the losses. In float64:
    in float32, Adam amplifies a rounding error to 5 % within ten steps.
    """
    from tests.pretrained.reference_test import START, drawn_start, labelled_batch

    model = Model(**START)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in drawn_start(shapes).items()})
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | ClassifierHead):
            module.eval()
    image, labels = labelled_batch()
    batch = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    classes, depth, normals, male = (torch.from_numpy(labels[task]) for task in START["tasks"])
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = {task: [] for task in START["tasks"]}
    for _ in range(10):
        raw = model(batch)
        unit = nn.functional.normalize(torch.tanh(raw["surface_normal"]), dim=1)
        losses = {
            "segmentsemantic": nn.functional.cross_entropy(raw["segmentsemantic"], classes, label_smoothing=0.1),
            "depth_euclidean": (torch.sigmoid(raw["depth_euclidean"][:, 0]) - depth).square().mean(),
            "surface_normal": 1 - (unit * normals.permute(0, 3, 1, 2)).sum(1).mean(),
            "class_male": nn.functional.binary_cross_entropy_with_logits(raw["class_male"], male),
        }
        adam.zero_grad()
        sum(losses.values()).backward()
        adam.step()
        for task, loss in losses.items():
            found[task].append(loss.item())
    return {"start/shapes": np.array(json.dumps(shapes))} | {
        f"start/{task}": np.array(values) for task, values in found.items()
    }


if __name__ == "__main__":
    from tests.pretrained.lomt_reference_test import PATH as LOMT_PATH
    from tests.pretrained.reference_test import PATH

    np.savez_compressed(PATH, **outputs(CASES, {}), **first_losses())
    np.savez_compressed(LOMT_PATH, **outputs(LOMT_CASES, LOMT_READS))
