"""keras.applications, on Keras' JAX backend."""

import functools
import os

from benchmarks.zoo.case import Case, load

SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
NAMES = """
    ConvNeXtTiny DenseNet121 EfficientNetB0 EfficientNetV2B0 InceptionV3 MobileNet MobileNetV2 MobileNetV3Small
    NASNetMobile ResNet50 ResNet50V2 VGG16 Xception MobileNetV3Large
""".split()
BIG = """
    InceptionResNetV2 DenseNet169 EfficientNetB1 EfficientNetV2S VGG19 ResNet101 ResNet101V2 ConvNeXtSmall
    EfficientNetB2 EfficientNetV2B1 DenseNet201 EfficientNetV2B2 EfficientNetB3 EfficientNetV2B3 EfficientNetB4
    ResNet152 ResNet152V2 EfficientNetB5 EfficientNetV2M ConvNeXtBase EfficientNetB6 NASNetLarge EfficientNetB7
    ConvNeXtLarge EfficientNetV2L ConvNeXtXLarge
""".split()


def build(name, size):
    """Return one of keras.applications as `fn((trainable, other), images)`."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = load("keras")
    model = getattr(keras.applications, name)(
        weights=None, classes=10, classifier_activation=None, input_shape=(size, size, 3)
    )

    def fn(params, images):
        return model.stateless_call(*params, images, training=False)[0]

    # dictionaries, so that weights are distinguished by their paths
    params = tuple(
        {f"{index:04}/{variable.path}": variable.value for index, variable in enumerate(variables)}
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    return lambda params, images: fn([list(part.values()) for part in params], images), params


def cases():
    """Return every model of keras.applications."""
    return [
        Case(
            "keras",
            name,
            functools.partial(build, name, SMALLEST.get(name, 64)),
            (SMALLEST.get(name, 64),) * 2 + (3,),
            big=name in BIG,
        )
        for name in NAMES + BIG
    ]
