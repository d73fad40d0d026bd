"""The Keras 3 adapter; the TensorFlow backend is the one that trains, and that reaches LiteRT."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slimline.basics.errors import require
from slimline.frameworks.device import wish
from slimline.methods.formats import Format
from slimline.runtimes.forms import ONNX, PLAIN, TENSORFLOW_FUNCTION

# Both must be set before the first import of keras: the backend, and TensorFlow's C++ log level.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
require("tensorflow", "keras")
keras: Any = require("keras", "keras")
# In a canonical model masks are arguments: what a layer of ours, whose name has a dot, does not pass on is not lost.
warnings.filterwarnings("ignore", r"Layer '\S+\.\S+' .* mask attached to it", UserWarning)

if TYPE_CHECKING:
    from slimline.basics.arrays import Example
    from slimline.files.slim.archive import Span
    from slimline.frameworks.base import Batch, Trainer
    from slimline.graph.edits import Edit
    from slimline.graph.ir import Graph
    from slimline.graph.quantization import Quantization
    from slimline.methods.outputs import Output
    from slimline.recipe.training import Training

Array = np.ndarray
CHUNK = 256
"""Samples per forward pass of `outputs`, so that activations of large data never live together."""


def _like(model: Any, source: Any) -> Any:
    """A changed copy in which what the user froze is frozen, and outputs are called as they were."""
    from slimline.frameworks.keras.functional import like

    return like(model, source)


class KerasAdapter:
    """Keras 3 models in canonical form, see `slimline.frameworks.base.Adapter` and `canonical`."""

    name = "keras"
    suffix = ".keras"
    layout: Literal["channels_last"] = "channels_last"
    marks_weights = True
    rounds_tensors = False
    learns_formats = True
    delays_formats = True

    @property
    def namespace(self) -> Any:
        """The array namespace in which it differentiates."""
        import keras

        return keras.ops

    def accepts(self, source: Any) -> bool:
        """Whether `source` is a `keras.Model`."""
        return isinstance(source, keras.Model)

    def load(self, source: Any, example: Example | None, dynamic: bool = False) -> tuple[Any, tuple[Array, ...]]:
        """See `load.load`; the shapes of Keras inputs say which sizes are free."""
        from slimline.frameworks.keras import load

        return load.load(source, example)

    def slots(self, source: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        """By path, of every variable."""
        return {v.path: (tuple(v.shape), str(v.dtype)) for v in source.weights}

    def fill(self, source: Any, tensors: Mapping[str, Array]) -> None:
        """Assign to every variable."""
        for variable in source.weights:
            variable.assign(tensors[variable.path])

    def masks(self, source: Any) -> dict[str, Array]:
        """None: Keras layers carry no masks of their own."""
        return {}

    def read(self, native: Any, example: tuple[Array, ...]) -> Graph:
        """See `read.read`."""
        from slimline.frameworks.keras import read

        return read.read(native, example)

    def parameters(self, native: Any) -> dict[str, Array]:
        """Every variable and constant under its name in the graph."""
        from slimline.frameworks.keras import rewrite

        return rewrite.parameters(native)

    def edit(self, native: Any, edits: Sequence[Edit], example: tuple[Array, ...]) -> Any:
        """See `slimline.frameworks.keras.edit`."""
        from slimline.frameworks.edit import carry_out
        from slimline.frameworks.keras.edit import EDITS
        from slimline.graph.edits import Extract

        edited = carry_out(native, edits, example, EDITS)
        return edited if any(isinstance(edit, Extract) for edit in edits) else _like(edited, native)

    def format_mismatches(self, native: Any, quantization: Quantization) -> list[str]:
        """See `fakequant.format_mismatches`."""
        from slimline.frameworks.keras.fakequant import format_mismatches

        return format_mismatches(native, quantization)

    def learned(self, native: Any, quantization: Quantization) -> Quantization:
        """See `learned.learned`."""
        from slimline.frameworks.keras.learned import learned

        return learned(native, quantization)

    def softened(self, native: Any) -> dict[str, Array]:
        """See `learned.softened`."""
        from slimline.frameworks.keras.learned import softened

        return softened(native)

    def form(
        self,
        native: Any,
        kind: str,
        example: tuple[Array, ...],
        integer: bool,
        weights: Mapping[str, Format] = PLAIN,
    ) -> Any:
        """See `slimline.frameworks.keras.onnx` and `slimline.frameworks.keras.function`."""
        if kind == ONNX:
            from slimline.frameworks.keras.onnx import to_onnx

            return to_onnx(native, example, integer, weights)
        from slimline.frameworks.keras.function import to_function

        assert kind == TENSORFLOW_FUNCTION
        return to_function(native)

    @property
    def parts(self) -> None:
        """None: a Keras model is read whole."""

    def free(self, native: Any) -> Literal["none", "batch", "sizes"]:
        """Which sizes of its inputs may change."""
        if any(size is None for tensor in native.inputs for size in tensor.shape[1:]):
            return "sizes"
        return "batch" if native.inputs[0].shape[0] is None else "none"

    def input_shapes(self, native: Any, example: tuple[Array, ...]) -> list[tuple[int | None, ...]]:
        """Those of its Keras inputs."""
        return [tuple(tensor.shape) for tensor in native.inputs]

    def outputs(self, native: Any, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs in inference mode, in chunks of `CHUNK` samples; 16-bit floats come as float32."""
        chunks = []
        for start in range(0, max(len(inputs[0]), 1), CHUNK):
            part = [np.asarray(x[start : start + CHUNK]) for x in inputs]
            outputs = keras.tree.flatten(native(part if len(part) > 1 else part[0], training=False))
            half = [keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16") for x in outputs]
            single = [keras.ops.cast(x, "float32") if h else x for x, h in zip(outputs, half, strict=True)]
            chunks.append([keras.ops.convert_to_numpy(x) for x in single])
        return tuple(x[0] if len(x) == 1 else np.concatenate(x) for x in zip(*chunks, strict=True))

    def output_names(self, native: Any) -> tuple[str, ...]:
        """As `load.output_names` noted them."""
        return tuple(native.output_names)

    def answers(self, native: Any, batches: Iterable[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        """What `outputs` gives."""
        from slimline.frameworks.keras.device import computing

        with computing(wish()):
            return [self.outputs(native, batch) for batch in batches]

    def device(self, wished: str | None) -> str:
        """See `device.device`."""
        from slimline.frameworks.keras import device

        return device.device(wished)

    def untrainable(self, native: Any) -> str | None:
        """None on TensorFlow; on other backends models are read, changed by what needs no gradients, and written as
        ONNX."""
        trains = keras.backend.backend() == "tensorflow"
        return None if trains else "Keras models on another backend than TensorFlow have none here"

    def uncompilable(self) -> None:
        """None: a step is one graph of TensorFlow's in any case."""

    def seed(self, seed: int) -> None:
        """Nothing: Keras' own generators are seeded where they are made."""

    def random_state(self) -> None:
        """None: TensorFlow's global generator cannot be read."""

    def set_random_state(self, state: None) -> None:
        """Nothing, as nothing was read."""

    def gradients(
        self,
        native: Any,
        batches: Iterable[Batch],
        loss: str,
        see: Callable[[Mapping[str, Array]], None] | None = None,
        outputs: Sequence[Output] | None = None,
    ) -> dict[str, Array]:
        """See `train.gradients`."""
        from slimline.frameworks.keras import train
        from slimline.frameworks.keras.device import computing

        with computing(wish()):
            return train.gradients(native, batches, loss, see, outputs)

    def observable(self, native: Any) -> dict[str, Any]:
        """See `observe.named_tensors`."""
        from slimline.frameworks.keras.observe import named_tensors

        return named_tensors(native)

    def observe(
        self,
        native: Any,
        batches: Iterable[tuple[Array, ...]],
        values: Sequence[str],
        see: Callable[[str, Array], None],
        sources: Sequence[str] | None = None,
    ) -> None:
        """See `observe.observe`."""
        from slimline.frameworks.keras import observe
        from slimline.frameworks.keras.device import computing

        with computing(wish()):
            observe.observe(native, batches, values, see, sources)

    def trainer(
        self,
        native: Any,
        teacher: Any | None,
        step: Training,
        seed: int,
        total_steps: int,
        outputs: Sequence[Output] | None = None,
    ) -> Trainer:
        """See `train.KerasTrainer`."""
        from slimline.frameworks.keras import train

        return train.KerasTrainer(native, teacher, step, seed, total_steps, wish(), outputs)

    def save(self, native: Any, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
        """See `save.save`."""
        from slimline.frameworks.keras import save

        save.save(native, path, example, metadata)

    def open(
        self, path: Path, allow_pickle: bool, example: Example | None = None
    ) -> tuple[Any, tuple[Array, ...], dict[str, Any]]:
        """See `save.open_`."""
        from slimline.frameworks.keras import save

        return save.open_(path, allow_pickle, example)

    def spans(self, content: bytes) -> list[Span]:
        """See `slimline.frameworks.keras.spans`."""
        from slimline.frameworks.keras.spans import spans

        return spans(content)


adapter = KerasAdapter()
