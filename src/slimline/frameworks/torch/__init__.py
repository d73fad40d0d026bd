"""PyTorch: networks enter through `torch.export` and stay trainable graph modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils import _pytree as pytree

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError, first_line
from slimline.frameworks.base import Array, Batch, Parts, Trainer
from slimline.frameworks.device import wish
from slimline.frameworks.edit import carry_out
from slimline.frameworks.torch import device, read, save
from slimline.frameworks.torch import native as natives
from slimline.frameworks.torch.native import Native
from slimline.graph.ir import Graph
from slimline.methods.formats import Format
from slimline.runtimes.forms import EXPORTED_PROGRAM, ONNX, PLAIN

if TYPE_CHECKING:
    from slimline.files.slim.archive import Span
    from slimline.graph.edits import Edit
    from slimline.graph.quantization import Quantization
    from slimline.methods.outputs import Output
    from slimline.recipe.training import Training


class TorchAdapter:
    """`slimline.frameworks.base.Adapter` for PyTorch; ``native`` is a `Native` graph module."""

    name = "torch"
    suffix = ".pt2"
    layout: Literal["channels_first"] = "channels_first"
    marks_weights = True
    rounds_tensors = True
    learns_formats = True
    delays_formats = False

    @property
    def namespace(self) -> Any:
        """The array namespace in which it differentiates."""
        import array_api_compat.torch as namespace

        return namespace

    def accepts(self, source: Any) -> bool:
        """Whether `source` is an `nn.Module` or an exported program."""
        return isinstance(source, (torch.nn.Module, torch.export.ExportedProgram))

    def load(self, source: Any, example: Example | None, dynamic: bool = False) -> tuple[Native, tuple[Array, ...]]:
        """See `slimline.frameworks.torch.read.load`."""
        return read.load(source, example, dynamic)

    def slots(self, source: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        """Of the state dict."""
        state = source.state_dict()
        return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()}

    def fill(self, source: Any, tensors: Mapping[str, Array]) -> None:
        """Copy into the tensors of the state dict."""
        for name, slot in source.state_dict().items():
            slot.copy_(torch.tensor(tensors[name]))

    def masks(self, source: Any) -> dict[str, Array]:
        """See `slimline.frameworks.torch.prune.masks`."""
        from slimline.frameworks.torch.prune import masks

        return masks(source)

    def read(self, native: Native, example: tuple[Array, ...]) -> Graph:
        """See `slimline.frameworks.torch.read.read`."""
        return read.read(native, example)

    def parameters(self, native: Native) -> dict[str, Array]:
        """Read-only views of every stored tensor; tied ones once, under the first name. Of bfloat16, which numpy does
        not have, copies in float32."""
        stored = {name: t.detach().cpu() for name, t in natives.tensors(native).items()}
        arrays = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy().view() for n, t in stored.items()}
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    def edit(self, native: Native, edits: Sequence[Edit], example: tuple[Array, ...]) -> Native:
        """See `slimline.frameworks.torch.edit`."""
        from slimline.frameworks.torch.edit import EDITS

        edited: Native = carry_out(native, edits, example, EDITS)
        return edited

    def format_mismatches(self, native: Native, quantization: Quantization) -> list[str]:
        """See `slimline.frameworks.torch.fakequant.format_mismatches`."""
        from slimline.frameworks.torch.fakequant import format_mismatches

        return format_mismatches(native, quantization)

    def softened(self, native: Native) -> dict[str, Array]:
        """See `slimline.frameworks.torch.learned`."""
        from slimline.frameworks.torch.learned import softened

        return softened(native)

    def learned(self, native: Native, quantization: Quantization) -> Quantization:
        """See `slimline.frameworks.torch.learned`."""
        from slimline.frameworks.torch.learned import learned

        return learned(native, quantization)

    def form(
        self,
        native: Native,
        kind: str,
        example: tuple[Array, ...],
        integer: bool,
        weights: Mapping[str, Format] = PLAIN,
    ) -> Any:
        """See `slimline.frameworks.torch.onnx` and `slimline.frameworks.torch.exported`."""
        if kind == EXPORTED_PROGRAM:
            from slimline.frameworks.torch.exported import to_program

            return to_program(native, example, integer, weights)
        from slimline.frameworks.torch.onnx import to_onnx

        assert kind == ONNX
        return to_onnx(native, example, integer, weights)

    @property
    def parts(self) -> Parts:
        """See `slimline.frameworks.torch.parts`."""
        from slimline.frameworks.torch.parts import TorchParts

        return TorchParts()

    def free(self, native: Native) -> natives.Free:
        """Which sizes of its inputs may change."""
        return native.free

    def input_shapes(self, native: Native, example: tuple[Array, ...]) -> list[tuple[int | None, ...]]:
        """See `slimline.frameworks.torch.native.input_shapes`."""
        return natives.input_shapes(native, example)

    def outputs(self, native: Native, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs in inference mode, as stored; of bfloat16, which numpy does not have, float32."""
        natives.check_batch(native, inputs)
        training = native.training
        if training:
            native.eval()
        try:
            with torch.no_grad():
                outputs = native(*natives.to_tensors(inputs))
        except (RuntimeError, ValueError, IndexError, TypeError) as reason:
            shapes = ", ".join(f"{x.dtype}{x.shape}" for x in inputs)
            raise SlimlineError(
                f"The model cannot take inputs {shapes} ({first_line(reason)}): "
                "give arrays of the shapes and dtypes of its example inputs."
            ) from reason
        finally:
            if training:
                native.train()
        leaves = [x.detach().cpu() for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        return tuple((x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in leaves)

    def output_names(self, native: Native) -> tuple[str, ...]:
        """From the structure of what it answers."""
        return natives.output_names(native)

    def answers(self, native: Native, batches: Iterable[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        """On the CPU just `outputs`."""
        where = self.device(wish())
        if where == device.CPU:
            return [self.outputs(native, batch) for batch in batches]
        from slimline.frameworks.torch.train import answers

        return answers(native, batches, where)

    def device(self, wished: str | None) -> str:
        """See `slimline.frameworks.torch.device`."""
        return device.device(wished)

    def untrainable(self, native: Native) -> None:
        """None: every model has gradients."""

    def uncompilable(self) -> str | None:
        """Of the CPU, see `slimline.frameworks.torch.compiled.uncompilable`; a trainer asks for its device."""
        from slimline.frameworks.torch.compiled import uncompilable

        return uncompilable(device.CPU)

    def seed(self, seed: int) -> None:
        """Of the CPU, and of GPUs that this process computes on."""
        device.generators(seed)

    def random_state(self) -> Any:
        """Of the same."""
        return device.generator_states()

    def set_random_state(self, state: Any) -> None:
        """Of the same."""
        device.set_generator_states(state)

    def gradients(
        self,
        native: Native,
        batches: Iterable[Batch],
        loss: str,
        see: Callable[[Mapping[str, Array]], None] | None = None,
        outputs: Sequence[Output] | None = None,
    ) -> dict[str, Array]:
        """See `slimline.frameworks.torch.train.gradients`."""
        from slimline.frameworks.torch.train import gradients

        return gradients(native, batches, loss, see, self.device(wish()), outputs)

    def observable(self, native: Native) -> set[str]:
        """The names of its fx nodes."""
        return {node.name for node in native.graph.nodes}

    def observe(
        self,
        native: Native,
        batches: Iterable[tuple[Array, ...]],
        values: Sequence[str],
        see: Callable[[str, Array], None],
        sources: Sequence[str] | None = None,
    ) -> None:
        """See `slimline.frameworks.torch.observe.observe`."""
        from slimline.frameworks.torch.observe import observe

        observe(native, batches, values, see, sources, self.device(wish()))

    def trainer(
        self,
        native: Native,
        teacher: Any | None,
        step: Training,
        seed: int,
        total_steps: int,
        outputs: Sequence[Output] | None = None,
    ) -> Trainer:
        """See `slimline.frameworks.torch.train.TorchTrainer`."""
        from slimline.frameworks.torch.train import TorchTrainer

        return TorchTrainer(native, teacher, step, seed, total_steps, self.device(wish()), outputs)

    def save(self, native: Native, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
        """See `slimline.frameworks.torch.save.save`."""
        save.save(native, path, example, metadata)

    def open(
        self, path: Path, allow_pickle: bool, example: Example | None = None
    ) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
        """See `slimline.frameworks.torch.save.open_`."""
        return save.open_(path, allow_pickle, example)

    def spans(self, content: bytes) -> list[Span]:
        """See `slimline.frameworks.torch.spans`."""
        from slimline.frameworks.torch.spans import spans

        return spans(content)


adapter = TorchAdapter()
