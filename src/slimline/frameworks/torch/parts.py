"""A module that does not export whole, taken apart: some submodules captured on the inputs they really receive.

`take_apart` gives the captured parts and the module around them; each part stands in it as a shell of the user's
submodule without weights, whose `forward` runs the captured graph. Sizes of a part's inputs stay free where its code
leaves them so, because a detector sees images of every size.
"""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slimline.basics.errors import SlimlineError, first_line, unknown
from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native
from slimline.frameworks.torch.program import structure
from slimline.frameworks.torch.read import capture, finite

_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Structure:
    """How tensors lie in nested tuples, lists and dicts, and the plain values between them.

    Attributes
    ----------
    spec : torch's tree specification, as JSON.
    plain : per leaf None for a tensor, or a list of one plain value.
    """

    spec: str
    plain: tuple[list[Any] | None, ...]

    @classmethod
    def of(cls, tree: Any, what: str) -> tuple[Structure, tuple[Tensor, ...]]:
        """The structure of a tree and its tensors; refused if a leaf is neither a tensor nor plain."""
        leaves, spec = pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise SlimlineError(
                    f"{what} a {type(leaf).__name__}, which slimline cannot carry across: name a submodule inside it "
                    "that takes and gives tensors."
                )
        plain = tuple(None if isinstance(leaf, Tensor) else [leaf] for leaf in leaves)
        return cls(pytree.treespec_dumps(spec), plain), tuple(x for x in leaves if isinstance(x, Tensor))

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """The tree with these tensors in it."""
        remaining = iter(tensors)
        leaves = [next(remaining) if value is None else value[0] for value in self.plain]
        return pytree.tree_unflatten(leaves, pytree.treespec_loads(self.spec))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"spec": json.loads(self.spec), "plain": list(self.plain)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Structure:
        """What `record` gave."""
        spec, plain = structure(json.dumps(record["spec"])), record["plain"]
        if not isinstance(plain, list) or not all(p is None or _is_plain(p) for p in plain):
            raise ValueError("a structure of other things than tensors and plain values")
        if len(plain) != pytree.treespec_loads(spec).num_leaves:
            raise ValueError("a structure of other parts than it says")
        return cls(spec, tuple(plain))


def _is_plain(held: Any) -> bool:
    return isinstance(held, list) and len(held) == 1 and isinstance(held[0], _PLAIN)


@dataclass(frozen=True)
class Interface:
    """What a part takes, as ``(args, kwargs)``, and what it answers."""

    name: str
    takes: Structure
    gives: Structure

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "takes": self.takes.record(), "gives": self.gives.record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Interface:
        """What `record` gave."""
        return cls(record["name"], *(Structure.from_record(record[side]) for side in ("takes", "gives")))


class _Alone(nn.Module):
    """A part at its own path under an empty module, called with its tensors in a row: names stay the user's."""

    def __init__(self, part: nn.Module, name: str, takes: Structure) -> None:
        super().__init__()
        *path, leaf = name.split(".")
        holder: nn.Module = self
        for step in path:
            holder.add_module(step, nn.Module())
            holder = holder.get_submodule(step)
        holder.add_module(leaf, part)
        self._name, self._takes = name, takes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._takes.fill(tensors)
        return _answers(self._name, self.get_submodule(self._name)(*args, **kwargs))[1]


def _answers(name: str, output: Any) -> tuple[Structure, tuple[Tensor, ...]]:
    return Structure.of(output, f"The part {name!r} answers")


def take_apart(
    module: nn.Module, args: tuple[Any, ...], names: Sequence[str]
) -> tuple[nn.Module, dict[str, tuple[Native, tuple[Array, ...]]]]:
    """Run `module` once in inference mode on `args` and capture the submodules `names` on what they receive.

    Returns
    -------
    A copy of the module in which the parts are put, and per part its native model and example inputs. The user's
    module stays as it was.

    Raises
    ------
    SlimlineError : for names that are unknown, overlap or share weights with the rest; for a part that does not run,
        is called in several ways, passes what is neither a tensor nor a plain value, or cannot be exported.
    """
    _check(module, names)
    finite(module.state_dict())
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        received = _receive(module, args, names)
        parts, interfaces = {}, []
        for name in names:
            interface, tensors = received[name]
            alone = _Alone(module.get_submodule(name), name, interface.takes).eval()
            example = tuple(x.cpu().numpy() for x in tensors)
            parts[name] = capture(alone, example, ("sizes", "batch"))
            interfaces.append(interface)
    finally:
        for m, mode in modes.items():
            m.training = mode
    return put_together(module, interfaces, {name: native for name, (native, _) in parts.items()}), parts


def _check(module: nn.Module, names: Sequence[str]) -> None:
    known = {name: m for name, m in module.named_modules() if name}
    for name in names:
        if name not in known:
            raise unknown("part", name, known)
    for name in names:
        inside = {id(m) for m in known[name].modules()}
        for other in names:
            if other != name and id(known[other]) in inside:
                raise SlimlineError(f"The parts {name!r} and {other!r} overlap: name only one of them.")
        own = {id(p) for p in known[name].parameters()}
        for path, m in module.named_modules():
            for leaf, p in m.named_parameters(recurse=False):
                if id(p) in own and id(m) not in inside:
                    raise SlimlineError(
                        f"The part {name!r} shares {path}.{leaf} with the rest of the model: name one that holds both."
                    )


def _receive(
    module: nn.Module, args: tuple[Any, ...], names: Sequence[str]
) -> dict[str, tuple[Interface, tuple[Tensor, ...]]]:
    """How each part is called in one run, and the tensors of its first call."""
    received: dict[str, tuple[Interface, tuple[Tensor, ...]]] = {}
    pending: dict[str, tuple[Structure, tuple[Tensor, ...]]] = {}

    def before(name: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            takes, tensors = Structure.of((args, kwargs), f"The part {name!r} receives")
            pending[name] = takes, tuple(x.detach().clone() for x in tensors)  # the part may write into them

        return hook

    def after(name: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            takes, tensors = pending.pop(name)
            interface = Interface(name, takes, _answers(name, output)[0])
            if received.setdefault(name, (interface, tensors))[0] != interface:
                raise SlimlineError(f"The part {name!r} is called in several ways: name its submodules instead.")

        return hook

    handles = []
    for name in names:
        part = module.get_submodule(name)
        handles += [
            part.register_forward_pre_hook(before(name), with_kwargs=True),
            part.register_forward_hook(after(name)),
        ]
    try:
        with torch.no_grad():
            module(*args)
    except (RuntimeError, ValueError, TypeError, IndexError) as reason:
        raise SlimlineError(
            f"{type(module).__name__} does not run on the example inputs ({first_line(reason)}): check them."
        ) from reason
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in received:
            raise SlimlineError(
                f"The part {name!r} never runs on the example inputs: leave it out, or give inputs that reach it."
            )
        if not received[name][1]:
            raise SlimlineError(f"The part {name!r} receives no tensor: name the submodule that does.")
    return received


def put_together(whole: nn.Module, interfaces: Sequence[Interface], natives: Mapping[str, Native]) -> nn.Module:
    """A copy of the module that runs the native parts; of the user's submodules it keeps all but the weights."""
    hollow: dict[int, Any] = {}
    for interface in interfaces:  # not even copied
        part = whole.get_submodule(interface.name)
        hollow |= {id(t): torch.empty(0) for t in (*part.parameters(), *part.buffers())}
    result: nn.Module = copy.deepcopy(whole, hollow)
    for interface in interfaces:
        shell = result.get_submodule(interface.name)
        for m in shell.modules():
            m._parameters.update(dict.fromkeys(m._parameters))
            m._buffers.update(dict.fromkeys(m._buffers))
        shell._slimline = interface  # type: ignore[assignment]
        shell.add_module("slimline", natives[interface.name])
        shell.forward = types.MethodType(_run, shell)
    return result


def _run(shell: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a part."""
    interface: Interface = shell._slimline  # type: ignore[assignment]
    structure, tensors = Structure.of((args, kwargs), f"The part {interface.name!r} receives")
    if structure != interface.takes:
        raise SlimlineError(
            f"The part {interface.name!r} is called in another way than on its example inputs: load the model with "
            "example inputs like these."
        )
    answers = shell.slimline(*tensors)  # type: ignore[operator]
    return interface.gives.fill(pytree.tree_leaves(answers))


def exchange(whole: nn.Module, new: Mapping[str, Native]) -> nn.Module:
    """A copy of what `put_together` gave, with other native parts."""
    result: nn.Module = copy.deepcopy(whole, {id(whole.get_submodule(n).slimline): native for n, native in new.items()})
    return result


def interfaces(whole: nn.Module) -> list[Interface]:
    """How the parts are called, in the order of the module."""
    return [m._slimline for m in whole.modules() if "_slimline" in vars(m)]  # type: ignore[misc]


def outer_state(whole: nn.Module) -> dict[str, Tensor]:
    """The state of all that is not a part."""
    inside = tuple(f"{i.name}.slimline." for i in interfaces(whole))
    return {name: t for name, t in whole.state_dict().items() if not name.startswith(inside)}


def load_outer_state(whole: nn.Module, state: Mapping[str, Array]) -> None:
    """Put the state of all that is not a part into a module of the same class."""
    own = outer_state(whole)
    if set(own) != set(state) or any(tuple(own[n].shape) != state[n].shape for n in own):
        differing = sorted(set(own) ^ set(state)) or [n for n in own if tuple(own[n].shape) != state[n].shape]
        raise SlimlineError(
            f"The saved parts belong to another model (they differ in {differing[0]}): give one of its class."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(state[name])))


class TorchParts:
    """`slimline.frameworks.base.Parts` for torch modules."""

    def take_apart(
        self, module: nn.Module, args: tuple[Any, ...], names: tuple[str, ...]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """See `take_apart`."""
        whole, captured = take_apart(module, args, names)
        return whole, dict(captured)

    def interfaces(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Interface]:
        """See `Interface.from_record`."""
        return [Interface.from_record(dict(record)) for record in records]

    def put_together(self, module: nn.Module, interfaces: Sequence[Interface], natives: Mapping[str, Any]) -> nn.Module:
        """See `put_together`."""
        return put_together(module, interfaces, natives)

    def exchange(self, whole: nn.Module, new: Mapping[str, Any]) -> nn.Module:
        """See `exchange`."""
        return exchange(whole, new)

    def records(self, whole: nn.Module) -> list[dict[str, Any]]:
        """Of `interfaces`."""
        return [interface.record() for interface in interfaces(whole)]

    def names(self, module: nn.Module) -> set[str]:
        """Of all submodules, dotted."""
        return {name for name, _ in module.named_modules() if name}

    def size(self, whole: nn.Module) -> int:
        """Of all parameters."""
        return sum(p.numel() for p in whole.parameters())

    def outer_state(self, whole: nn.Module) -> dict[str, Array]:
        """See `outer_state`."""
        return {name: np.ascontiguousarray(t.detach().cpu().numpy()) for name, t in outer_state(whole).items()}

    def load_outer_state(self, whole: nn.Module, state: Mapping[str, Array]) -> None:
        """See `load_outer_state`."""
        load_outer_state(whole, state)
