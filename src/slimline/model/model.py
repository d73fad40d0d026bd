"""A network as slimline sees it: a framework's model, and what has been done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Adapter, framework
from slimline.graph.edits import Edit
from slimline.graph.ir import Graph, InputSpec
from slimline.graph.quantization import Quantization
from slimline.recipe.packed import PackedMask


@dataclass(frozen=True)
class Model:
    """A network that knows its history. Steps give a new one and leave this one as it was.

    Attributes
    ----------
    adapter : the framework it lives in.
    native : the torch `GraphModule` or `keras.Model`, which can be trained, or an ONNX model.
    example : example inputs, each ``(batch, …)``.
    history : one entry per step that made it: ``{"step": …, the step's fields …}``.
    quantization : formats of its tensors, once a quantization step has set them; `native` then simulates them.
    masks : by weight name, boolean and of the weight's shape: what is False is zero and stays zero through every
        step that follows, until `slimline.finalize`.
    origin : the uncompressed model that steps made it of, from which training learns; None where this one is itself
        uncompressed, and where it is not known, as files do not hold it. It shares its tensors with the `Model` that
        the first step was given.
    """

    adapter: Adapter
    native: Any
    example: tuple[np.ndarray, ...]
    history: tuple[Mapping[str, Any], ...] = ()
    quantization: Quantization | None = None
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    origin: Model | None = field(default=None, repr=False, compare=False)

    @cached_property
    def graph(self) -> Graph:
        """The neutral graph of `native`."""
        return self.adapter.read(self.native, self.example)

    @cached_property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Name, shape and dtype of each input; None in a shape is a size that may change."""
        shapes = self.adapter.input_shapes(self.native, self.example)
        triples = zip(self.graph.inputs, shapes, self.example, strict=True)
        return tuple(InputSpec(name, shape, x.dtype.name) for name, shape, x in triples)

    @property
    def framework(self) -> str:
        """Its adapter's name."""
        return self.adapter.name

    @property
    def usual_target(self) -> str:
        """The runtime for which models of its framework are compressed where the user names none."""
        return framework(self.adapter.name).target

    @property
    def forms(self) -> tuple[str, ...]:
        """The exchange forms in which it can be handed to a runtime (`slimline.runtimes.forms`)."""
        return framework(self.adapter.name).forms

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of all its outputs, in their order."""
        return self.adapter.output_names(self.native)

    @property
    def uncompressed(self) -> Model | None:
        """`origin`, or this model itself while nothing has been done to it; None where it is not known."""
        return self.origin or (None if self.history else self)

    def predict(self, *inputs: np.ndarray) -> np.ndarray:
        """The output for inputs ``(batch, …)``, in inference mode; of a model with several the first, see `outputs`."""
        return self.adapter.outputs(self.native, inputs)[0]

    def outputs(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs, in the order of `output_names` and of an artifact's, in inference mode."""
        return self.adapter.outputs(self.native, inputs)

    def parameters(self) -> dict[str, np.ndarray]:
        """Every stored tensor by the user's own name."""
        return self.adapter.parameters(self.native)

    def check_float(self) -> None:
        """Refuse to change the shapes or the function of a quantized model, whose formats were measured with them."""
        if self.quantization is not None:
            raise SlimlineError(
                "This model is quantized, and its integer grids belong to the shapes and values they were measured "
                "with: prune first, then quantize."
            )

    def edit(self, *edits: Edit) -> Any:
        """What `native` becomes by the edits; this model stays as it is."""
        return self.adapter.edit(self.native, edits, self.example)

    def edited(
        self, edits: Sequence[Edit], step: Mapping[str, Any], masks: Mapping[str, np.ndarray] | None = None
    ) -> Model:
        """The model that `step` made of this one by these edits; its masks stay unless there are new ones.

        Raises
        ------
        SlimlineError : this model is quantized.
        """
        self.check_float()
        return self.then(self.edit(*edits), step, masks=masks)

    def then(
        self,
        native: Any,
        step: Mapping[str, Any],
        quantization: Quantization | None = None,
        masks: Mapping[str, np.ndarray] | None = None,
    ) -> Model:
        """The model that `step` made of this one; its masks stay unless there are new ones."""
        return replace(
            self,
            native=native,
            history=(*self.history, step),
            quantization=quantization or self.quantization,
            masks=self.masks if masks is None else masks,
            origin=self.uncompressed,
        )

    @classmethod
    def restored(
        cls, adapter: Adapter, native: Any, example: tuple[np.ndarray, ...], metadata: Mapping[str, Any]
    ) -> Model:
        """The model that `save` wrote, from what the adapter read.

        Raises
        ------
        SlimlineError : `metadata` that `save` does not write.
        """
        history, masks = metadata.get("history", []), metadata.get("masks", {})
        quantization = metadata.get("quantization")
        plain = isinstance(history, list) and all(isinstance(h, dict) for h in history)
        plain = plain and all(isinstance(h.get("step"), str) for h in history)
        if not plain or not isinstance(masks, dict) or not metadata.keys() <= {"history", "masks", "quantization"}:
            raise SlimlineError("The file's notes of what was done to the model are damaged: save the model again.")
        try:
            return cls(
                adapter,
                native,
                example,
                tuple(history),
                None if quantization is None else Quantization.from_notes(quantization),
                {name: _mask(mask) for name, mask in masks.items()},
            )
        except (SlimlineError, ValueError) as reason:  # pydantic's are ValueErrors too
            raise SlimlineError(
                "The file's notes of formats or masks of the model are damaged, or an older slimline wrote them: save "
                "the model again, or quantize the float model anew."
            ) from reason

    @takes(path=arguments.path)
    def save(self, path: str | Path) -> Path:
        """Write a ``.pt2``, ``.keras`` or ``.onnx`` without pickle; `slimline.load` reads it back, history too."""
        path = Path(path)
        if path.suffix != self.adapter.suffix:
            raise SlimlineError(
                f"A {self.framework} model is saved as {self.adapter.suffix}, not {path.suffix or path.name!r}."
            )
        metadata: dict[str, Any] = {"history": list(self.history)}
        if self.quantization is not None:
            metadata["quantization"] = self.quantization.notes()
        if self.masks:
            metadata["masks"] = dict(self.masks)
        self.adapter.save(self.native, path, self.example, metadata)
        return path


def _mask(stored: Any) -> np.ndarray:
    """A mask of a file; files were once written with masks as text.

    Raises
    ------
    ValueError : what is no mask.
    """
    if isinstance(stored, np.ndarray) and stored.dtype == np.bool_:
        return stored
    return PackedMask.model_validate(stored).array()


def is_model(name: str, value: Any) -> None:
    """Refuse an argument that is no `Model`; see `slimline.basics.arguments.takes`."""
    if not isinstance(value, Model):
        raise SlimlineError(f"{name} is a {type(value).__name__}, no slimline model: load it with slimline.load first.")
