"""Exports of torch's zoos as ONNX files, with random weights: is each pruned exactly, with nothing but the file?

    python benchmarks/zoo_onnx.py [NAME …]

Needs an environment with torchvision and timm beside slimline; nothing is downloaded. ``torchvision/NAME`` and
``timm/FAMILY`` are the models of zoo_torchvision.py and zoo_timm.py, written by torch's exporter; ``NAME@13`` by its
older one, in version 13 of the operators, as most files that are about were. All that is asked is asked of the file:
*error* is between the removed and the masked model in ONNX Runtime, on another batch than the example.
"""

from __future__ import annotations

import io
import logging
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zoo
import zoo_timm
import zoo_torchvision
from zoo import Case, exported, main, pruned, verdict

TORCHVISION = """alexnet convnext_tiny deeplabv3_mobilenet_v3_large densenet121 efficientnet_b0 efficientnet_v2_s
fcn_resnet50 googlenet inception_v3 lraspp_mobilenet_v3_large mnasnet0_5 mobilenet_v2 mobilenet_v3_small r3d_18
regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11_bn
vit_b_16"""
OLDER = """torchvision/densenet121 torchvision/efficientnet_b0 torchvision/googlenet torchvision/mobilenet_v2
torchvision/mobilenet_v3_small torchvision/regnet_y_400mf torchvision/resnet18 torchvision/shufflenet_v2_x0_5
torchvision/squeezenet1_1 torchvision/vgg11_bn timm/ghostnet timm/resnest"""


def write(case: Case, path: Path, opset: int | None) -> None:
    """The model of a torch case, with norms that are not 1, as an ONNX file of a free batch."""
    import torch

    module, example = case.make()
    module.eval()
    zoo._unsettle(module)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if opset is None:
            free = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
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


def check(case: Case) -> dict[str, Any]:
    """Everything that is asked of one file."""
    import torch

    import slimline as sl

    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"covered": False, "failure": "", "trained": True}  # not asked: a file does not train
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            case.make(path)  # type: ignore[call-arg]
        except Exception as error:  # torch's exporter raises many types
            return {**row, "failure": f"torch does not export it ({str(error).strip().splitlines()[0][:120]})"}
        clock = time.perf_counter()
        try:
            model = sl.load(path)
        except sl.SlimlineError as error:
            return {**row, "failure": str(error)}
        row["seconds_to_load"] = round(time.perf_counter() - clock, 1)
        plan, small, masked, facts = pruned(model)
        row |= facts
        batch = zoo._another(model.example, model.adapter.free(model.native) == "none")
        inputs = tuple(x.numpy() for x in batch)
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


def cases() -> dict[str, Case]:
    """A sample of torchvision's models, one of every family of timm's, and some again by the older exporter."""
    by_name = {f"torchvision/{name}": zoo_torchvision.case(name) for name in TORCHVISION.split()}
    by_name |= {f"timm/{family}": zoo_timm.case(family) for family in zoo_timm.MODELS}
    newest = {name: Case(_writer(case, None)) for name, case in by_name.items()}
    return newest | {f"{name}@13": Case(_writer(by_name[name], 13)) for name in OLDER.split()}


def _writer(case: Case, opset: int | None) -> Callable[..., Any]:
    return lambda path: write(case, path, opset)


if __name__ == "__main__":
    main("onnx", cases(), {}, __doc__, check)
