"""The nets of dm-haiku, and some built of its layers."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.zoo.case import Case, key, load


def build(net, shape):
    """Return a Haiku net as `fn((params, state), images)`, and the shapes of params and state."""
    hk = load("haiku")
    # state has its shapes from training mode only
    transformed = hk.transform_with_state(lambda images, is_training: net(hk)(images, is_training))
    init = functools.partial(transformed.init, is_training=True)
    params = jax.eval_shape(init, key(), jnp.zeros((1, *shape)))
    return lambda params, images: transformed.apply(*params, None, images, False)[0], params


def resnet(name, hk, **options):
    """Return hk.nets.ResNet*."""
    return getattr(hk.nets, name)(num_classes=10, **options)


def mobilenet(hk, **options):
    """Return hk.nets.MobileNetV1."""
    return hk.nets.MobileNetV1(num_classes=10, **options)


def mlp(hk):
    """Return hk.nets.MLP on flattened images."""
    return lambda images, _: hk.nets.MLP([128, 64, 64, 10])(hk.Flatten()(images))


def vq_vae(hk):
    """Return the encoder and decoder of Haiku's VQ-VAE example, with its quantizer between them."""

    def net(images, _):
        x = images
        for channels in (64, 128):
            x = jax.nn.relu(hk.Conv2D(channels, 4, stride=2)(x))
        for _ in range(2):
            x = x + hk.Conv2D(128, 1)(jax.nn.relu(hk.Conv2D(32, 3)(jax.nn.relu(x))))
        x = hk.Conv2D(64, 1)(jax.nn.relu(x))
        x = x + hk.nets.VectorQuantizer(64, 128, 0.25)(x, is_training=False)["quantize"]
        x = jax.nn.relu(hk.Conv2D(128, 3)(x))
        return hk.Conv2DTranspose(3, 4, stride=2)(jax.nn.relu(hk.Conv2DTranspose(64, 4, stride=2)(x)))

    return net


def autoregressive(hk):
    """Return an LSTM over the rows of an image, unrolled by scan."""

    def net(images, _):
        rows = jnp.swapaxes(images.reshape(*images.shape[:2], -1), 0, 1)
        core = hk.DeepRNN([hk.LSTM(64), jax.nn.relu, hk.Linear(32)])
        outputs, _ = hk.dynamic_unroll(core, rows, core.initial_state(images.shape[0]))
        return hk.Linear(10)(outputs[-1])

    return net


def attention(hk):
    """Return a transformer of Haiku's attention layers on patches of 8x8."""

    def net(images, _):
        x = hk.Conv2D(64, 8, stride=8)(images)
        x = x.reshape(x.shape[0], -1, 64)
        x = x + hk.get_parameter("positions", x.shape[1:], init=hk.initializers.RandomNormal())
        norm = functools.partial(hk.LayerNorm, -1, True, True)
        for _ in range(3):
            y = norm()(x)
            x = x + hk.MultiHeadAttention(4, 16, model_size=64, w_init=hk.initializers.RandomNormal())(y, y, y)
            x = x + hk.Linear(64)(jax.nn.gelu(hk.Linear(128)(norm()(x))))
        return hk.Linear(10)(norm()(x).mean(1))

    return net


def cases():
    """Return Haiku's nets."""
    nets = {
        **{name: functools.partial(resnet, name) for name in ("ResNet18", "ResNet34", "ResNet50")},
        "ResNet50 v2": functools.partial(resnet, "ResNet50", resnet_v2=True),
        "MobileNetV1": mobilenet,
        "MobileNetV1 without BN": functools.partial(mobilenet, use_bn=False),
        "MLP": mlp,
        "VQ-VAE": vq_vae,
        "LSTM over rows": autoregressive,
        "transformer": attention,
        "ResNet101": functools.partial(resnet, "ResNet101"),
    }
    small = ("MLP", "VQ-VAE", "LSTM over rows")
    return [
        Case("haiku", name, functools.partial(build, net, shape), shape)
        for name, net in nets.items()
        for shape in [(32, 32, 3) if name in small else (64, 64, 3)]
    ]
