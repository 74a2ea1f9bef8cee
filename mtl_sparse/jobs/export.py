"""`--job=export`: a run's model as one file that runs without this package, StableHLO (`jax.export`) or ONNX."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import export as jax_export

from input_pipeline import transforms
from mtl_sparse.compaction import exactness
from mtl_sparse.models import atrous
from mtl_sparse.report import records
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import setup as setup_lib

_PLATFORMS = ("cpu", "cuda")  # that a StableHLO file runs on
_TOLERANCE = 1e-4  # of an output's largest value


def run_job(config, workdir: str | pathlib.Path) -> pathlib.Path:
    """Write a run's model to `<workdir>/export/model.stablehlo` or `model.onnx`, with a JSON file on how to call it.

    The file takes normalized images, float32 [B, H, W, 3], with H and W as in config.data.size and any B. It returns
    the raw predictions of each task; a compact model has the tasks of config.compact.tasks. The outputs of the written
    file are compared with the model's before it is kept.

    Returns:
      The path of the file.

    Raises:
      UserError: OPTION_UNKNOWN_VALUE for export.format, EXTRA_MISSING if the converter is not installed,
        EXPORT_NOT_EXACT if the file's outputs differ, or as `setup.compact`.
    """
    if config.export.format not in _FORMATS:
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"expected export.format to be one of {', '.join(_FORMATS)}, got export.format={config.export.format!r}",
        )
    write, read = _FORMATS[config.export.format]
    workdir = pathlib.Path(workdir).expanduser()
    model, variables = setup_lib.load_model(workdir, config)
    if config.export.compact:
        model, variables = setup_lib.compact(config, model, variables)
    size = tuple(config.data.size)
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    path = folder / f"model.{config.export.format}"
    partial = folder / f"partial.{config.export.format}"
    images = _images(workdir, size, config.data.unit_range)
    try:
        write(model, variables, size, partial)
        call, expected = read(partial), jax.jit(model.apply)
        error = np.max([exactness.largest_difference(expected(variables, x), call(x)) for x in (images[:1], images)])
        if not error <= _TOLERANCE:
            raise UserError(
                "EXPORT_NOT_EXACT",
                f"expected {path} to have the outputs of the run's model, got a difference of {error:.1e} of the "
                "largest; it was not written",
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    statistics = transforms.image_statistics(config.data.unit_range)
    description = {
        "input": {"shape": ["batch", *size, 3], "dtype": "float32", "layout": "RGB / 255, minus mean, over std"},
        **{name: values.tolist() for name, values in zip(("mean", "std"), statistics, strict=True)},
        "outputs": {name: channels for name, _, channels in model.heads},
        "platforms": _PLATFORMS if config.export.format == "stablehlo" else None,
        "largest_difference": float(error),
    }
    files.write_json(folder / f"{path.name}.json", description)
    logging.info("%s: %.1f MB, outputs equal to %.0e of the largest", path, path.stat().st_size / 1e6, error)
    print(path)
    return path


def _images(workdir, size, unit_range):
    """Return normalized images to check a file with: test images of samples.npz, or noise if their size differs."""
    if (workdir / "samples.npz").exists():
        images = records.read_samples(workdir)["image"]
        if images.shape[1:3] == size and len(images) > 1:
            return transforms.normalize_image(images, unit_range)
    return np.random.default_rng(0).normal(size=(3, *size, 3)).astype(np.float32)


def _write_stablehlo(model, variables, size, path):
    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)
    exported = jax_export.export(jax.jit(lambda x: model.apply(variables, x)), platforms=_PLATFORMS)(images)
    path.write_bytes(exported.serialize())


def _read_stablehlo(path):
    return jax_export.deserialize(bytearray(path.read_bytes())).call


def _write_onnx(model, variables, size, path):
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(
            "EXTRA_MISSING", f"export.format='onnx' needs jax2onnx; run pip install -e '.[onnx]' ({error})"
        ) from error
    with atrous.plain_convolutions():
        proto = to_onnx(
            lambda images: tuple(model.apply(variables, images).values()),
            [("batch", *size, 3)],
            input_names=["images"],
            output_names=[name for name, *_ in model.heads],
        )
    # jax2onnx 0.17 moves layers from NHWC to NCHW but keeps some of their old shapes, which runtimes then refuse.
    del proto.graph.value_info[:]
    path.write_bytes(proto.SerializeToString())


def _read_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True))


_FORMATS = {"stablehlo": (_write_stablehlo, _read_stablehlo), "onnx": (_write_onnx, _read_onnx)}
