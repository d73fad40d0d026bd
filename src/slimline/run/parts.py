"""A torch model whose control flow depends on data, compressed by its parts.

Detectors choose boxes in Python, so `torch.export` cannot take them whole; their backbones and heads it can. Every
part is an ordinary `Model`. What crosses a part's boundary keeps its size, since the code between the parts counts on
it; all that lies inside can be pruned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from slimline.files import array_files

from slimline.files import strictjson
from slimline.errors import NothingToPrune, SlimlineError, unknown
from slimline.frameworks.base import adapter_for
from slimline.graph.plan import Plan
from slimline.graph.units import Units
from slimline.model import Model

if TYPE_CHECKING:
    from slimline.recipe import Step

MANIFEST, REST = "parts.json", "rest.safetensors"


@dataclass(frozen=True)
class PartedModel:
    """A module with some of its submodules captured. Steps give a new one and leave this one as it was.

    Attributes
    ----------
    native : the user's kind of module, trainable, which runs the parts; on a part it keeps the user's attributes and
        methods, but no other weights than the part's own (as its submodule ``slimline``).
    parts : each part's `Model`, by its name in the user's module.
    """

    native: Any
    parts: Mapping[str, Model]

    @property
    def size(self) -> int:
        """Number of trained numbers, parts and rest together."""
        return sum(p.numel() for p in self.native.parameters())

    def then(self, parts: Mapping[str, Model]) -> PartedModel:
        """The model with these parts in place of its own."""
        from slimline.frameworks.torch.parts import exchange

        merged = {**self.parts, **parts}
        return PartedModel(exchange(self.native, {name: m.native for name, m in merged.items()}), merged)

    def save(self, folder: str | Path) -> Path:
        """Write a folder without pickle: a ``.pt2`` per part, the other weights as safetensors, and a manifest.

        The user's class is not in it: ``slimline.load(module, parts=folder)`` puts it together again, `module` being
        one of that class, whatever its weights.
        """
        from slimline.frameworks.torch.parts import interfaces, rest

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: f"part-{i}.pt2" for i, name in enumerate(self.parts)}
        for name, model in self.parts.items():
            model.save(folder / files[name])
        state = {name: np.ascontiguousarray(t.detach().cpu().numpy()) for name, t in rest(self.native).items()}
        (folder / REST).write_bytes(safetensors.numpy.save(state))
        record = [{**i.record(), "file": files[i.name]} for i in interfaces(self.native)]
        (folder / MANIFEST).write_text(json.dumps({"schema": 1, "parts": record}, indent=1))
        return folder


@dataclass(frozen=True)
class PartedPlan:
    """A plan per part; `mask` and `apply` carry them out."""

    plans: Mapping[str, Plan]

    def mask(self, model: PartedModel) -> PartedModel:
        """A new model of the same shapes that computes what `apply`'s will."""
        return model.then({name: plan.mask(model.parts[name]) for name, plan in self.plans.items()})

    def apply(self, model: PartedModel) -> PartedModel:
        """A new model from which the positions are really removed."""
        return model.then({name: plan.apply(model.parts[name]) for name, plan in self.plans.items()})

    def summary(self) -> dict[str, Any]:
        """What goes from every part, ready for JSON."""
        return {name: plan.summary() for name, plan in self.plans.items()}

    def to_json(self, indent: int | None = 2) -> str:
        """The plans as JSON text; `from_json` reads them back for the same model."""
        return json.dumps(self.summary(), indent=indent)

    @classmethod
    def from_json(cls, text: str, model: PartedModel) -> PartedPlan:
        """The plans that `to_json` wrote, for `model`."""
        return cls({name: Plan.from_json(json.dumps(p), model.parts[name]) for name, p in json.loads(text).items()})

    def __str__(self) -> str:
        return "\n".join(f"{name}: {plan}" for name, plan in self.plans.items())


def load(module: Any, example: Any, parts: Sequence[str] | str | Path) -> PartedModel:
    """Capture submodules of `module`, or put together what `PartedModel.save` wrote.

    Parameters
    ----------
    example : what the module is called with, a tuple for several arguments; anything it takes, nested as it likes.
    parts : names of submodules, dotted, or the folder of a saved model.
    """
    if adapter_for(module).name != "torch":
        raise SlimlineError("Only torch modules are loaded by parts: a Keras model is read whole.")
    from slimline.frameworks.torch.parts import take_apart

    adapter = adapter_for(module)
    if isinstance(parts, str | Path):
        return _open(module, Path(parts))
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise SlimlineError(f"parts is {parts!r}: give names of submodules, such as parts=['backbone'].")
    if not parts:
        raise SlimlineError("No part was named: name submodules, such as parts=['backbone'].")
    if example is None:
        raise SlimlineError("A model is loaded by parts with example_inputs: what the module is called with.")
    args = example if isinstance(example, tuple) else (example,)
    native, found = take_apart(module, args, tuple(dict.fromkeys(parts)))
    return PartedModel(native, {name: Model(adapter, *captured) for name, captured in found.items()})


def _open(module: Any, folder: Path) -> PartedModel:
    from slimline.frameworks.torch.parts import Interface, load_rest, put_together

    adapter = adapter_for(module)
    try:
        record = _manifest(strictjson.parse((folder / MANIFEST).read_bytes()))
        interfaces = [Interface.from_record(entry) for entry in record]
        state = array_files.safetensors(folder / REST)
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise SlimlineError(f"{folder} is not a folder that a model by parts was saved to: check the path.") from reason
    known = {name for name, _ in module.named_modules() if name}
    parts = {}
    for entry in record:
        if entry["name"] not in known:
            raise unknown(f"part in a {type(module).__name__}", entry["name"], known)
        native, example, metadata = adapter.open(folder / entry["file"], False)
        parts[entry["name"]] = Model.restored(adapter, native, example, metadata)
    whole = put_together(module, interfaces, {name: m.native for name, m in parts.items()})
    load_rest(whole, state)
    return PartedModel(whole, parts)


def _manifest(content: Any) -> list[dict[str, Any]]:
    """The entries of a manifest, whose files lie beside it."""
    match content:
        case {"schema": 1, "parts": list(entries)}:
            for i, entry in enumerate(entries):
                if not isinstance(entry["name"], str) or entry["file"] != f"part-{i}.pt2":
                    raise ValueError("an entry that names no part")
            return entries
    raise ValueError("no manifest of parts")


def plan_parts(model: PartedModel, step: Step, seed: int = 0) -> PartedPlan:
    """What a `ChannelPruning` removes from every part, each planned by itself; globs are on the whole model's names.

    A part of which nothing can be pruned, such as one layer between two boundaries, stays, with a note in its plan;
    it is an error where that is every part.
    """
    from slimline.steps.channels.selection import plan
    from slimline.recipe import ChannelPruning

    for part in model.parts.values():
        part.check_float()
    if not isinstance(step, ChannelPruning) or step.schedule != "oneshot":
        raise SlimlineError(
            f"{type(step).__name__} cannot be done to a model by parts: prune its channels in one shot, and train its "
            "native module."
        )
    if step.cut is not None:
        raise SlimlineError(f"A model by parts is not pruned along {step.cut}: prune parts['name'] by itself.")
    if step.needs:
        raise SlimlineError("A model by parts is pruned without data: choose the criterion l1, l2 or random.")
    globs = {field: tuple(getattr(step, field)) for field in ("layers", "keep")}
    every = [layer for part in model.parts.values() for layer in _layers(part)]
    for field, wanted in globs.items():
        for glob in wanted:
            if glob != "*" and not any(fnmatchcase(layer, glob) for layer in every):
                raise unknown(f"layer for {field}", glob, every)
    plans, idle = {}, []
    for name, part in model.parts.items():
        own = {f: tuple(g for g in wanted if _matches(part, g)) for f, wanted in globs.items()}
        if own["layers"]:
            try:
                plans[name] = plan(part, step.model_copy(update=own), None, seed)
            except NothingToPrune as reason:
                plans[name] = Plan(Units(part.graph), {}, (str(reason),))
                idle.append(f"In the part {name!r}: {reason}")
            except SlimlineError as reason:
                raise SlimlineError(f"In the part {name!r}: {reason}") from reason
    if plans and len(idle) == len(plans):
        raise NothingToPrune(" ".join(idle))
    return PartedPlan(plans)


def _layers(part: Model) -> list[str]:
    return list(dict.fromkeys(n.layer for n in part.graph.nodes if n.layer))


def _matches(part: Model, glob: str) -> bool:
    return glob == "*" or any(fnmatchcase(layer, glob) for layer in _layers(part))


def apply(model: PartedModel, steps: Sequence[Step], seed: int = 0) -> PartedModel:
    """A new model to which the steps were done, one after the other."""
    for step in steps:
        model = plan_parts(model, step, seed).apply(model)
    return model
