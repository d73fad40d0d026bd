"""The layers that one layer of a user's is taken apart into, with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.functional import Copies, clone, finalize


class Parts:
    """Copies of one operation and of the layers it is made of, each made once per original."""

    def __init__(self, name: str, copies: Copies) -> None:
        self.name, self.copies = name, copies

    def make(self, owner: Any, part: str, build: Callable[[str], Any]) -> Any:
        """The operation called ``name.part`` that belongs to `owner`."""
        return self.copies.of((id(owner), part), lambda: build(f"{self.name}.{part}"))

    def copy(self, operation: Any, name: str, **changes: Any) -> Any:
        """The copy of an operation under a new name, without weights."""
        return self.copies.of(id(operation), lambda: clone(operation, name=name, **changes))

    @staticmethod
    def weighted(source: Any, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call `layer` (which builds it), then give it the weights of `source`."""
        outputs = layer(*args, **kwargs)
        transfer(source.variables, layer)
        return outputs


def transfer(source: Sequence[Any], layer: Any) -> None:
    """Copy variables or arrays, in order, into a layer of the same class and config."""
    if [tuple(v.shape) for v in source] != [tuple(v.shape) for v in layer.variables]:
        raise SlimlineError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be copied: its config does not rebuild "
            "the same weights; make get_config return all that __init__ and build use."
        )
    for old, new in zip(source, layer.variables, strict=True):
        new.assign(old)
        if getattr(old, "trainable", True) is False and new.trainable:  # a variable that the user froze by itself
            new.trainable = False
    finalize(layer)
