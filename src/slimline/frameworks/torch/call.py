"""One native operator on its way into the neutral graph: what a rule sees, and how it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from slimline.frameworks.base import Array
from slimline.frameworks.torch.operators import argument, layer, packet
from slimline.graph.ir import Node, Value
from slimline.graph.ops import Attributes

Shape = tuple[int, ...]


class Call:
    """An operator with the shapes and numbers of one run.

    Parameters
    ----------
    results : of every fx node: `Value` for a tensor, lists of them, numbers.
    constants : integer tensors that no input and no weight decides.
    names : value name of every fx node that is a tensor.
    values : all values; a rule of several steps adds those in between.
    outputs : names of the values it makes.
    """

    def __init__(
        self,
        node: fx.Node,
        results: Mapping[fx.Node, Any],
        constants: Mapping[fx.Node, Array],
        names: Mapping[fx.Node, str],
        values: dict[str, Value],
        outputs: tuple[str, ...],
    ) -> None:
        self.node = node
        self.outputs = outputs
        self.emitted: list[Node] = []
        self._results, self._constants, self._names, self._values = results, constants, names, values

    def __getitem__(self, name: str) -> Any:
        """An argument by the name in its schema, sizes as plain numbers, tensors as fx nodes."""
        return self._plain(argument(self.node, name))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            result = self._results.get(value)
            return result if isinstance(result, (int, float, bool)) else value
        return [self._plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    def value(self, node: Any) -> str | None:
        """Name of the value of a tensor argument; None for anything else."""
        return self._names.get(node) if isinstance(node, fx.Node) else None

    def tensor(self, name: str) -> str | None:
        """Name of the value that an argument is, None where it is absent or a number."""
        return self.value(argument(self.node, name))

    def tensors(self, *names: str) -> list[str | None]:
        """Those of the named arguments, absent ones None; without names all tensors that it reads."""
        if names:
            return [self.tensor(name) for name in names]
        values: list[str | None] = []
        for node in self.node.all_input_nodes:
            value = self.value(node)
            if value is not None:
                values.append(value)
        return values

    def shape(self, value: str | None) -> Shape:
        """Shape of a value."""
        return self._values[value].shape if value is not None else ()

    def dtype(self, value: str | None) -> str:
        """Numpy's name of a value's type."""
        return self._values[value].dtype if value is not None else ""

    def constant(self, node: Any) -> Array | None:
        """The numbers of an integer constant, or None."""
        return self._constants.get(node) if isinstance(node, fx.Node) else None

    def reads(self, index: int) -> bool:
        """Whether anything reads the output of that index."""
        users = [user for user in self.node.users if packet(user) == "getitem" and user.args[1] == index]
        return any(user.users for user in users)

    def takes(self, name: str) -> bool:
        """Whether the operator's schema has an argument of this name."""
        return any(a.name == name for a in self.node.target._schema.arguments)  # type: ignore[union-attr]

    @property
    def input(self) -> Shape:
        """Shape of the first tensor."""
        return self.shape(self.tensors()[0])

    @property
    def rank(self) -> int:
        """Dimensions of the first tensor."""
        return len(self.input)

    @property
    def output(self) -> Shape:
        """Shape of the first output."""
        return self.shape(self.outputs[0])

    def axis(self, name: str = "dim", rank: int | None = None) -> int:
        """A dimension argument, counted from the front."""
        return int(self[name]) % max(self.rank if rank is None else rank, 1)

    def axes(self, name: str = "dim") -> list[int]:
        """A list of dimensions, counted from the front; all where there is none."""
        dims = self[name]
        if dims is None or dims == []:
            return list(range(self.rank))
        return [d % self.rank for d in (dims if isinstance(dims, list) else [dims])]

    def emit(
        self,
        kind: str,
        inputs: Sequence[str | None],
        attributes: Attributes,
        outputs: tuple[str, ...] | None = None,
    ) -> None:
        """Answer with a neutral operator that makes `outputs` (all by default)."""
        outputs = self.outputs if outputs is None else outputs
        last = outputs[-1] == self.outputs[-1]
        name = self.node.name if last else f"{self.node.name}/{len(self.emitted)}"
        self.emitted.append(Node(name, kind, tuple(inputs), outputs, attributes, self.layer, self.target))

    def between(self, kind: str, inputs: Sequence[str | None], attributes: Attributes, shape: Sequence[int]) -> str:
        """Emit a step before the last; the name of the value it makes, of `shape`."""
        name = f"{self.node.name}/{len(self.emitted)}"
        self._values[name] = Value(name, tuple(shape), self._values[self.outputs[0]].dtype)
        self.emit(kind, inputs, attributes, (name,))
        return name

    @property
    def target(self) -> str:
        """The native operator."""
        return packet(self.node)

    @property
    def layer(self) -> str:
        """The user's name of the innermost module that called it."""
        return layer(self.node)
