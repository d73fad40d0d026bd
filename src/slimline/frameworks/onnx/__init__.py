"""ONNX: networks of any exporter, as messages or files, computed by ONNX Runtime and trained by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array, Batch, Trainer
from slimline.frameworks.edit import carry_out
from slimline.frameworks.onnx import load, read, save
from slimline.frameworks.onnx.native import Native
from slimline.graph.ir import Graph
from slimline.methods.formats import Format
from slimline.runtimes.forms import ONNX, PLAIN

if TYPE_CHECKING:
    from slimline.files.slim.archive import Span
    from slimline.graph.edits import Edit
    from slimline.graph.quantization import Quantization
    from slimline.methods.outputs import Output
    from slimline.recipe.training import Training


class OnnxAdapter:
    """`slimline.frameworks.base.Adapter` for ONNX; ``native`` is a `Native`."""

    name = "onnx"
    suffix = ".onnx"
    layout: Literal["channels_first"] = "channels_first"
    marks_weights = True
    rounds_tensors = True
    learns_formats = False
    delays_formats = False

    @property
    def namespace(self) -> Any:
        """That of PyTorch, which trains."""
        from slimline.frameworks.onnx.train import torch_adapter

        return torch_adapter().namespace

    def accepts(self, source: Any) -> bool:
        """Whether `source` is an `onnx.ModelProto`."""
        return isinstance(source, onnx.ModelProto)

    def load(self, source: Any, example: Example | None, dynamic: bool = False) -> tuple[Native, tuple[Array, ...]]:
        """See `load.load`; the message says itself which sizes are free, and `dynamic` asks for one besides the
        batch."""
        native, arrays = load.load(source, example)
        if dynamic and native.free != "sizes":
            raise SlimlineError(
                "The ONNX model leaves no size of its inputs free but the batch: load it without dynamic, or export it "
                "anew with dynamic axes; sizes of 1 in the example are taken for fixed."
            )
        return native, arrays

    def slots(self, source: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        """Of the initializers."""
        kind = onnx.helper.tensor_dtype_to_np_dtype
        return {t.name: (tuple(t.dims), kind(t.data_type).name) for t in source.graph.initializer}

    def fill(self, source: Any, tensors: Mapping[str, Array]) -> None:
        """Put into the initializers."""
        for tensor in source.graph.initializer:
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(onnx.numpy_helper.from_array(tensors[tensor.name].astype(kind), tensor.name))

    def masks(self, source: Any) -> dict[str, Array]:
        """None: a message carries no masks."""
        return {}

    def read(self, native: Native, example: tuple[Array, ...]) -> Graph:
        """See `read.read`."""
        return read.read(native, example)

    def parameters(self, native: Native) -> dict[str, Array]:
        """Read-only arrays of all that is stored and no mere number of an operator."""
        return dict(native.tensors)

    def edit(self, native: Native, edits: Sequence[Edit], example: tuple[Array, ...]) -> Native:
        """See `slimline.frameworks.onnx.edit`."""
        from slimline.frameworks.onnx.edit import EDITS

        edited: Native = carry_out(native, edits, example, EDITS)
        return edited

    def format_mismatches(self, native: Native, quantization: Quantization) -> list[str]:
        """See `fakequant.format_mismatches`."""
        from slimline.frameworks.onnx.fakequant import format_mismatches

        return format_mismatches(native, quantization)

    def form(
        self,
        native: Native,
        kind: str,
        example: tuple[Array, ...],
        integer: bool,
        weights: Mapping[str, Format] = PLAIN,
    ) -> Any:
        """See `fakequant.to_onnx`."""
        from slimline.frameworks.onnx.fakequant import to_onnx

        assert kind == ONNX
        return to_onnx(native, example, integer, weights)

    @property
    def parts(self) -> None:
        """None: an ONNX model is read whole."""

    def free(self, native: Native) -> Literal["none", "batch", "sizes"]:
        """Which sizes of its inputs may change."""
        return native.free

    def input_shapes(self, native: Native, example: tuple[Array, ...]) -> list[tuple[int | None, ...]]:
        """Those of its graph."""
        return native.input_shapes

    def outputs(self, native: Native, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs, as stored."""
        rows = len(native.example[0]) if native.free == "none" and native.example[0].ndim else None
        if rows is not None and inputs[0].ndim and len(inputs[0]) != rows:
            raise SlimlineError(
                f"The model takes batches of exactly {rows}, not {len(inputs[0])}: export it with a free batch "
                "(dynamic_shapes or dynamic_axes of torch's exporters), or give batches of that size."
            )
        return tuple(native.session(inputs))

    def output_names(self, native: Native) -> tuple[str, ...]:
        """As the file calls them."""
        return tuple(str(value.name) for value in native.model.graph.outputs)

    def answers(self, native: Native, batches: Iterable[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        """What `outputs` gives."""
        return [self.outputs(native, batch) for batch in batches]

    def device(self, wished: str | None) -> str:
        """Where PyTorch trains them, if it is installed; all else is computed on the CPU."""
        from slimline.frameworks.onnx.train import has_torch, torch_adapter

        if wished == "cpu":  # which takes seconds less to say than PyTorch to load
            return wished
        if has_torch():
            return torch_adapter().device(wished)
        if wished not in (None, "cpu"):
            raise SlimlineError(
                f"Without PyTorch ONNX models are computed on the CPU, not on {wished}: leave the device out."
            )
        return "cpu"

    def untrainable(self, native: Native) -> str | None:
        """See `train.obstacle`."""
        from slimline.frameworks.onnx.train import obstacle

        return obstacle(native)

    def uncompilable(self) -> str | None:
        """What PyTorch says, which trains; without it nothing is trained."""
        from slimline.frameworks.onnx.train import has_torch, torch_adapter

        return torch_adapter().uncompilable() if has_torch() else None

    def seed(self, seed: int) -> None:
        """Nothing: nothing here is random."""

    def random_state(self) -> None:
        """None, as there is none."""

    def set_random_state(self, state: None) -> None:
        """Nothing, as nothing was read."""

    def gradients(
        self,
        native: Native,
        batches: Iterable[Batch],
        loss: str,
        see: Callable[[Mapping[str, Array]], None] | None = None,
        outputs: Sequence[Output] | None = None,
    ) -> dict[str, Array]:
        """See `train.gradients`."""
        from slimline.frameworks.onnx.train import gradients

        return gradients(native, batches, loss, see, outputs)

    def observable(self, native: Native) -> frozenset[str]:
        """See `native.Native.names`."""
        return native.names

    def observe(
        self,
        native: Native,
        batches: Iterable[tuple[Array, ...]],
        values: Sequence[str],
        see: Callable[[str, Array], None],
        sources: Sequence[str] | None = None,
    ) -> None:
        """See `observe.observe`."""
        from slimline.frameworks.onnx.observe import observe

        observe(native, batches, values, see, sources)

    def trainer(
        self,
        native: Native,
        teacher: Any | None,
        step: Training,
        seed: int,
        total_steps: int,
        outputs: Sequence[Output] | None = None,
    ) -> Trainer:
        """See `train.OnnxTrainer`."""
        from slimline.frameworks.onnx.train import OnnxTrainer

        return OnnxTrainer(native, teacher, step, seed, total_steps, outputs)

    def save(self, native: Native, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
        """See `save.save`."""
        save.save(native, path, example, metadata)

    def open(
        self, path: Path, allow_pickle: bool, example: Example | None = None
    ) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
        """See `save.open_`."""
        return save.open_(path, example)

    def spans(self, content: bytes) -> list[Span]:
        """See `slimline.frameworks.onnx.spans`."""
        from slimline.frameworks.onnx.spans import spans

        return spans(content)


adapter = OnnxAdapter()
