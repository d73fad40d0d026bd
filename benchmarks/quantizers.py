"""The runtimes' own quantizers, each given a network in float32 and calibration samples: what slimline is held against.

All but ONNX Runtime's, which it brings, and ExecuTorch's, which torchao brings, are read from the folder `common.PEERS`
and never enter the project's environment:

    pip install --no-deps --target /tmp/peers nncf pydot ninja ai-edge-quantizer litert-lm-builder immutabledict

Each is used as its documentation shows it for static INT8 on a CPU: integer weights per channel and its own default
ranges. `compressed_openvino` and `matmul_nbits` store weights alone in few bits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from common import peer

from slimline.runtimes.base import runtime
from slimline.runtimes.forms import EXPORTED_PROGRAM, Form

BATCH = 64
"""Calibration samples at a time."""
SIGNATURE = "serving_default"
Samples = Mapping[str, np.ndarray]
"""Calibration samples ``(n, …)`` by the name of the artifact's input."""


def batches(samples: Samples) -> Iterator[dict[str, np.ndarray]]:
    """`BATCH` samples at a time, and what is left of them."""
    rows = len(next(iter(samples.values())))
    for start in range(0, rows, BATCH):
        yield {name: x[start : start + BATCH] for name, x in samples.items()}


def onnxruntime(
    source: Path,
    target: Path,
    samples: Samples,
    transformer: bool = False,
    weights: str = "QInt8",
    ranges: str = "MinMax",
) -> None:
    """ONNX Runtime's `quantize_static`: QDQ, uint8 activations, weights of a type per channel, folded first."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = batches(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    prepared = target.with_name("prepared.onnx")
    # The symbolic shapes of a transformer from torch's exporter are none that its inference follows.
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=transformer)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType[weights],
        per_channel=True,
        calibrate_method=CalibrationMethod[ranges],
    )


def openvino(source: Path, target: Path, samples: Samples, transformer: bool = False) -> None:
    """NNCF's `quantize`, with its settings for transformers where the network is one."""
    nncf = peer("nncf", "nncf pydot ninja")
    import openvino as ov

    rows = list(batches(samples))
    with redirect_stdout(io.StringIO()):
        quantized = nncf.quantize(
            ov.Core().read_model(source),
            nncf.Dataset(rows),
            subset_size=len(rows),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
    ov.save_model(quantized, target, compress_to_fp16=False)


def nncf_onnx(source: Path, target: Path, samples: Samples) -> None:
    """NNCF's `quantize` of the ONNX file itself, for ONNX Runtime."""
    nncf = peer("nncf", "nncf pydot ninja")
    import onnx

    rows = list(batches(samples))
    with redirect_stdout(io.StringIO()):
        onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(rows), subset_size=len(rows)), target)


def litert(source: Path, target: Path, samples: Samples, transformer: bool = False) -> None:
    """ai-edge-quantizer's recipe `static_wi8_ai8`, with float inputs and outputs."""
    aeq = peer("ai_edge_quantizer", "ai-edge-quantizer litert-lm-builder immutabledict")
    signed = target.with_name("signed.tflite")
    signed.write_bytes(_signed(source.read_bytes(), list(samples)))
    with redirect_stdout(io.StringIO()):
        quantizer = aeq.Quantizer(str(signed), aeq.recipe.static_wi8_ai8())
        for end in (aeq.qtyping.TFLOperationName.INPUT, aeq.qtyping.TFLOperationName.OUTPUT):
            quantizer.update_quantization_recipe(
                ".*", end, algorithm_key=aeq.algorithm_manager.AlgorithmName.NO_QUANTIZE
            )
        ranges = quantizer.calibrate({SIGNATURE: list(batches(samples))}, num_threads=1)
        quantizer.quantize(ranges, enable_progress_report=False).export_model(str(target), overwrite=True)


def _signed(model: bytes, names: Sequence[str]) -> bytes:
    """A ``.tflite`` file with what ai-edge-quantizer needs and slimline leaves out: a signature, tensors' names."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    content = schema.ModelT.InitFromPackedBuf(model, 0)
    graph, signature = content.subgraphs[0], schema.SignatureDefT()
    signature.signatureKey = SIGNATURE
    sides = ((names, graph.inputs), ([f"output{i}" for i in range(len(graph.outputs))], graph.outputs))
    signature.inputs, signature.outputs = ([_named(*pair) for pair in zip(*side, strict=True)] for side in sides)
    content.signatureDefs = [signature]
    for index, tensor in enumerate(graph.tensors):
        tensor.name = f"tensor{index}"
    builder = flatbuffers.Builder(len(model))
    builder.Finish(content.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _named(name: str, index: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, int(index)
    return entry


def compressed_openvino(source: Path, target: Path, samples: Samples, bits: int, group: int, **more: Any) -> None:
    """NNCF's `compress_weights`: symmetric integers of `bits` in blocks of `group`, embeddings and the last layer in
    INT8, as it leaves them by itself. Its GPTQ takes weights ``(outputs, inputs)`` alone, so all are laid so first."""
    nncf = peer("nncf", "nncf pydot ninja")
    import openvino as ov
    from openvino import opset13
    from openvino.utils import replace_node

    model = ov.Core().read_model(source)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        weight = node.input_value(1).get_node()
        if weight.get_type_name() == "Constant" and weight.data.ndim == 2:
            turned = opset13.constant(np.ascontiguousarray(weight.data.T))
            product = opset13.matmul(node.input_value(0), turned, node.get_attributes()["transpose_a"], True)
            product.set_friendly_name(node.get_friendly_name())
            replace_node(node, product)
    ((name, rows),) = samples.items()
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode[f"INT{bits}_SYM"],
        group_size=group,
        dataset=nncf.Dataset([{name: row[None]} for row in rows]) if more else None,
        subset_size=len(rows),
        **more,
    )
    ov.save_model(compressed, target, compress_to_fp16=False)


def matmul_nbits(source: Path, target: Path, group: int) -> None:
    """ONNX Runtime's `MatMulNBitsQuantizer`: symmetric INT4 in blocks of `group`, to nearest."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=group, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


def executorch(network: Any, target: Path, samples: Samples, transformer: bool = False) -> None:
    """PyTorch 2 export quantization by XNNPACK's quantizer, of a torch module that takes the samples in their order;
    the quantized program is lowered as slimline's is."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    rows = [tuple(torch.from_numpy(x) for x in part.values()) for part in batches(samples)]
    free = tuple({0: torch.export.Dim("batch", min=1, max=1024)} for _ in rows[0])
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    # To choose between these backends of a convolution torch narrows the range of a free batch.
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        prepared = prepare_pt2e(torch.export.export(network, rows[0], dynamic_shapes=free).module(), quantizer)
        for row in rows:
            prepared(*row)
        program = torch.export.export(convert_pt2e(prepared), rows[0], dynamic_shapes=free)
    runtime("executorch").lower(Form(EXPORTED_PROGRAM, program, integer=True), target)


QUANTIZERS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "onnxruntime": ("quantize_static", "onnxruntime", onnxruntime),
    "openvino": ("NNCF", "nncf", openvino),
    "litert": ("ai-edge-quantizer", "ai-edge-quantizer", litert),
    "executorch": ("pt2e", "torchao", executorch),
}
"""By target the name of its own quantizer, the package that it is in, and what writes an artifact by it; ExecuTorch's
takes the network itself, the others the float artifact that slimline wrote."""
