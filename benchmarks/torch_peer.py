"""Training step and inference of the same model in plain PyTorch, written from the paper's description.

The model is in `tests/torch_reference.py`. A step is: forward pass in training mode, three losses, uncertainty
weighting, backward pass, fused AdamW, and with a penalty the proximal step in Adam's metric, by five Newton iterations
that are vectorized over the groups of each kernel. The scheme of the reference implementation ("released scheme") runs
the backbone once for each task; its own proximal step is several times slower than the one here.
"""

import contextlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import random_batch
from tests.torch_reference import Model

TASKS = {"segmentation": ("deeplab", 40), "depth": ("deeplab", 1), "normals": ("deeplab", 3)}
RELEASED = "PyTorch, released scheme"
# name -> (whether the tasks share one backbone pass, channels last, compiled)
VARIANTS = {
    RELEASED: (False, False, False),
    "PyTorch, shared": (True, False, False),
    "PyTorch, shared, channels last": (True, True, False),
    "PyTorch, shared, channels last, compiled": (True, True, True),
}
LEARNING_RATE, LAMBDA, EPSILON = 1e-4, 1e-5, 1e-8


class Repeated(nn.Module):
    """A model that runs its backbone once for each task."""

    def __init__(self, model: Model) -> None:
        """Keep the model."""
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images to each task's raw prediction."""
        return {task: self.model.decoders[task](self.model.backbone(images)) for task in self.model.tasks}


@torch.no_grad()
def proximal_step(kernels: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Apply the group-lasso proximal step to the input channels of each kernel, in place.

    Args:
      kernels: parameters [O, I, H, W].
      optimizer: an Adam, whose state gives the metric.
    """
    for kernel in kernels:
        state = optimizer.state[kernel]
        z = kernel.transpose(0, 1).flatten(1)
        v = state["exp_avg_sq"].transpose(0, 1).flatten(1)
        d = torch.sqrt(v / (1 - 0.999 ** state["step"].item())) + EPSILON
        t = LEARNING_RATE * LAMBDA * z.shape[1] ** 0.5
        dz = d * z
        norm = dz.norm(dim=1, keepdim=True)
        theta = ((norm - t) / d.amax(1, keepdim=True)).clamp(min=0)
        for _ in range(5):  # Newton on |dz / (d theta + t)|^2 = 1, from below
            q = dz / (d * theta + t)
            slope = -2 * (q * q * d / (d * theta + t)).sum(1, keepdim=True)
            theta = theta - ((q * q).sum(1, keepdim=True) - 1) / slope
        x = torch.where(norm > t, z * (d * theta) / (d * theta + t), 0)
        kernel.copy_(x.reshape(kernel.shape[1], kernel.shape[0], *kernel.shape[2:]).transpose(0, 1))


def _tensors(batch, layout, device):
    """Return a batch as PyTorch tensors in NCHW, with labels at an eighth of the size."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in batch.items()}
    tensors = {name: value if name == "image" else value[:, 4::8, 4::8] for name, value in tensors.items()}
    moved = {name: value.permute(0, 3, 1, 2) if value.ndim == 4 else value for name, value in tensors.items()}
    moved["segmentation"] = moved["segmentation"].long()
    return {**moved, "image": moved["image"].contiguous(memory_format=layout)}


def _losses(raw, batch):
    depth = torch.sigmoid(raw["depth"][:, 0].float())
    normals = functional.normalize(torch.tanh(raw["normals"].float()), dim=1)
    logits = raw["segmentation"].float()
    return {
        "segmentation": functional.cross_entropy(logits, batch["segmentation"], label_smoothing=0.1),
        "depth": functional.mse_loss(depth, batch["depth"]),
        "normals": (1 - (normals * batch["normals"]).sum(1)).mean(),
    }


def _build(variant, width, head_features, device, dtype):
    """Return (model, function to call, memory layout, context of the forward pass)."""
    shared, last, compiled = VARIANTS[variant]
    if device == "cuda":  # what JAX does by default: TF32, and the fastest of cuDNN's algorithms
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    model = Model(50, TASKS, width, head_features)
    model = (model if shared else Repeated(model)).to(device, memory_format=layout)
    context = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    return model, torch.compile(model) if compiled else model, layout, context


def training_step(
    *, variant, size, batch, penalty=False, width=64, head_features=256, device="cpu", dtype="float32"
):  # fmt: skip
    """Return a function () -> loss that takes one training step; see `inference` for the arguments."""
    model, call, layout, context = _build(variant, width, head_features, device, dtype)
    model.train()
    scales = nn.Parameter(torch.ones(len(TASKS), device=device))
    optimizer = torch.optim.AdamW([*model.parameters(), scales], lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    backbone = [value for name, value in model.named_parameters() if "backbone" in name and value.ndim == 4]
    data = _tensors(random_batch(size, batch), layout, device)

    def step():
        with context:
            raw = call(data["image"])
        losses = torch.stack(list(_losses(raw, data).values()))
        loss = (torch.exp(-scales) * losses + scales).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if penalty:
            proximal_step(backbone, optimizer)
        return loss.item()

    return step


def inference(*, variant, size, batch, width=64, head_features=256, device="cpu", dtype="float32"):
    """Return a function () -> None that runs the whole model in evaluation mode.

    Args:
      variant: a key of `VARIANTS`.
      size: side of the images in pixels.
      batch: images in a call.
      width: channels of the backbone's first stage.
      head_features: channels inside the heads.
      device: PyTorch's device.
      dtype: "float32", or "bfloat16" for autocast.
    """
    model, call, layout, context = _build(variant, width, head_features, device, dtype)
    model.eval()
    x = _tensors(random_batch(size, batch), layout, device)["image"]

    def run():
        with torch.inference_mode(), context:
            raw = call(x)
        next(iter(raw.values())).sum().item()  # waits for a GPU

    return run
