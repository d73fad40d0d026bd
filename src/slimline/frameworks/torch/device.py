"""What torch does otherwise on a GPU than on the CPU: placing a graph, random numbers, determinism, errors.

On the CPU every function here leaves things as they are, so that nothing there depends on this module.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimline.basics.errors import SlimlineError, first_line
from slimline.frameworks.base import Array
from slimline.frameworks.device import choose

CPU = "cpu"


def device(wished: str | None) -> str:
    """The device that a wish means here, see `slimline.frameworks.device`."""
    return choose(
        wished,
        {
            "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
            "mps": int(torch.backends.mps.is_available()),
            "cpu": 1,
        },
    )


def kind(device: str) -> str:
    """``cuda`` of ``cuda:1``."""
    return device.partition(":")[0]


def move(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device; in float32 where that has no float64. On the CPU the same one."""
    if kind(device) == "mps" and tensor.dtype == torch.float64:
        tensor = tensor.float()
    return tensor.to(device)


def place(module: fx.GraphModule, device: str) -> None:
    """Move, in place, a graph module to a device: its tensors, and what its operators make there.

    Raises
    ------
    SlimlineError : weights in float64 for a device that has none.
    """
    if device == CPU:
        return
    if kind(device) == "mps":
        every = (*module.named_parameters(), *module.named_buffers())
        wide = next((name for name, tensor in every if tensor.dtype == torch.float64), None)
        if wide is not None:
            raise SlimlineError(f"{wide} is stored in float64, which MPS does not have: choose device cpu.")
    module.to(device)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            place_graph(part.graph, device)
            part.recompile()


def place_graph(graph: fx.Graph, device: str) -> None:
    """Let, in place, the operators of a graph make their tensors on a device; export wrote down the one it ran on."""
    if device == CPU:
        return
    destination = torch.device(device)

    def moved(value: Any) -> Any:
        return destination if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        if _makes(node) and node.kwargs.get("device") is None:
            node.kwargs = {**node.kwargs, "device": destination}
        elif node.target is torch.ops.higher_order.wrap_with_autocast:
            node.args = (kind(device), *node.args[1:])


def _makes(node: fx.Node) -> bool:
    """Whether an operator makes a tensor out of nothing, on the CPU where it is not told another device."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


@contextmanager
def computing(device: str) -> Iterator[None]:
    """Compute on a device as repeatably and as exactly as on the CPU, and say in a sentence what it cannot do.

    Convolutions in float32 are just that (TensorFloat-32 keeps 10 bits); operators that have no deterministic kernel
    run all the same, and torch warns of them.
    """
    if device == CPU:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a workspace of its own
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    )
    torch.use_deterministic_algorithms(True, warn_only=not (before[0] and not before[1]))
    try:
        with cudnn:
            yield
    except RuntimeError as error:
        if isinstance(error, NotImplementedError):
            raise SlimlineError(
                f"{device} does not compute this model ({first_line(error)}): choose device cpu."
            ) from error
        if "out of memory" in str(error):
            raise SlimlineError(
                f"The memory of {device} is full: use a smaller batch_size, or choose device cpu."
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def seeded(device: str, seed: int) -> Tensor:
    """The state of a device's random generator that starts from `seed`."""
    return torch.Generator(device).manual_seed(seed).get_state()


@contextmanager
def drawing(device: str, state: Tensor) -> Iterator[None]:
    """Let operators on a device draw from `state`, which becomes what they leave; the process's own stays."""
    outside = _read(device)
    _write(device, state)
    try:
        yield
    finally:
        state.copy_(_read(device))
        _write(device, outside)


def _read(device: str) -> Tensor:
    match kind(device):
        case "cuda":
            return torch.cuda.get_rng_state(device)
        case "mps":
            return torch.mps.get_rng_state()
        case _:
            return torch.get_rng_state()


def _write(device: str, state: Tensor) -> None:
    match kind(device):
        case "cuda":
            torch.cuda.set_rng_state(state, device)
        case "mps":
            torch.mps.set_rng_state(state)
        case _:
            torch.set_rng_state(state)


def random_name(device: str) -> str:
    """Under what a checkpoint keeps the random state; each kind of device has a generator of its own."""
    return "random" if device == CPU else f"random/{kind(device)}"


def random_of(state: Mapping[str, Array], device: str) -> Tensor:
    """The random state that a checkpoint holds for a device; from another kind of device one that starts from it."""
    own = state.get(random_name(device))
    if own is not None:
        return torch.tensor(own)
    other = next(state[name] for name in map(random_name, ("cpu", "cuda", "mps")) if name in state)
    return seeded(device, int.from_bytes(hashlib.sha256(other.tobytes()).digest()[:4], "little"))


def generators(seed: int) -> None:
    """Seed every random generator of the process, as far as it is in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def generator_states() -> dict[str, Tensor]:
    """Of all those, by device."""
    used = [CPU]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        used += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        used.append("mps")
    return {device: _read(device) for device in used}


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """What `generator_states` gave."""
    for device, state in states.items():
        _write(device, state)


def to_cpu(source: nn.Module | torch.export.ExportedProgram) -> nn.Module | torch.export.ExportedProgram:
    """A user's model in the computer's own memory: itself, or a copy of a module that lies on a GPU.

    Raises
    ------
    SlimlineError : a program that was exported on a GPU, as its operators name it.
    """
    if isinstance(source, torch.export.ExportedProgram):
        held = [x for x in (*source.state_dict.values(), *source.constants.values()) if isinstance(x, Tensor)]
        if not _near(held):
            raise SlimlineError("The program was exported on a GPU: export it on the cpu, or give the module itself.")
        return source
    return source if _near([*source.parameters(), *source.buffers()]) else copy.deepcopy(source).to(CPU)


def _near(tensors: Iterable[Tensor]) -> bool:
    """Whether none lies on a GPU; what is on ``meta`` has no numbers and is refused elsewhere."""
    return all(tensor.device.type in ("cpu", "meta") for tensor in tensors)
