"""Which inner values of a student learn from which of its teacher, and the terms of the loss that this makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from slimline.basics.errors import SlimlineError, unknown
from slimline.frameworks.base import Term
from slimline.graph.ir import Node
from slimline.methods import features
from slimline.recipe.training import FeatureLoss, Training

if TYPE_CHECKING:
    from slimline.model import Model

T = TypeVar("T")
_CHANNELS_INSIDE = ("conv", "batch_norm", "group_norm", "pool")
_CHANNELS_LAST = ("linear", "layer_norm", "embedding", "attention", "einsum", "matmul")
_AS_ITS_INPUT = ("elementwise", "normalize", "softmax", "pad", "concat", "slice")
_DISTANCES: Mapping[str, Callable[..., Any]] = {
    "hint": features.hint,
    "attention": features.attention,
    "similarity": features.similarity,
    "rkd": features.relational,
    "crd": features.contrast,
}
_OF_SAMPLES = ("similarity", "rkd", "crd")
_DEEPEST_ALONE = (*_OF_SAMPLES, "relations")
"""Losses that the deepest pair of layers has by itself where none is named."""


@dataclass(frozen=True)
class Tap:
    """An inner value that is read as features.

    Attributes
    ----------
    name : of the value in the graph.
    layer : as the user names it.
    axis : of its channels.
    shape : of it, for a batch.
    """

    name: str
    layer: str
    axis: int
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def size(self) -> tuple[int, ...]:
        """Of its positions."""
        return tuple(s for axis, s in enumerate(self.shape) if axis not in (0, self.axis))

    def read(self, xp: Any, value: Any) -> Any:
        """``(batch, positions, channels)``."""
        return xp.reshape(xp.moveaxis(value, self.axis, -1), (-1, math.prod(self.size), self.channels))

    def grid(self, xp: Any, value: Any) -> Any:
        """``(batch, *size, channels)``."""
        return xp.reshape(xp.moveaxis(value, self.axis, -1), (-1, *self.size, self.channels))


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values of attention.

    Attributes
    ----------
    name : of the value in the graph.
    order : its axes as ``(batch, heads, positions, width)``.
    """

    name: str
    order: tuple[int, ...]

    def read(self, xp: Any, value: Any) -> Any:
        """``(batch, heads, positions, width)``."""
        for to, source in enumerate(self.order):
            if to < source:  # every order here is made by one exchange
                return xp.swapaxes(value, to, source)
        return value


@dataclass(frozen=True)
class Attention:
    """Attention of several heads: its distribution as a value where the graph has one, else by query and key."""

    layer: str
    distribution: str | None
    query: Heads
    key: Heads
    value: Heads

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values that `maps` reads."""
        return (self.query.name, self.key.name) if self.distribution is None else (self.distribution,)

    def map(self, xp: Any, values: Sequence[Any]) -> Any:
        """The distribution, of these values."""
        if self.distribution is not None:
            return values[0]
        return features.attention_map(xp, self.query.read(xp, values[0]), self.key.read(xp, values[1]))


class Inside:
    """The layers of one network, as the losses of features find them.

    Parameters
    ----------
    who : it is, for messages.
    """

    def __init__(self, model: Model, who: str) -> None:
        self.graph, self.who = model.graph, who
        self._inside = model.adapter.layout == "channels_first"
        self._producers, self._readers = self.graph.producers(), self.graph.consumers()

    @cached_property
    def layers(self) -> Mapping[str, Tap]:
        """By layer, or by what its name begins with up to a dot, the last value that it computes."""
        taps: dict[str, Tap] = {}
        for node in self.graph.nodes:
            if (tap := self._tap(node)) is None:
                continue
            parts = tap.layer.split(".")
            for name in (".".join(parts[:number]) for number in range(1, len(parts) + 1)):
                taps[name] = tap
        return taps

    @cached_property
    def stages(self) -> dict[tuple[int, ...], list[Tap]]:
        """By size of their positions the ends of residual branches, or else the last value of that size."""
        sums: dict[tuple[int, ...], list[Tap]] = {}
        last: dict[tuple[int, ...], list[Tap]] = {}
        for node in self.graph.nodes:
            if (tap := self._tap(node)) is None or not tap.size or node.kind == "pad":
                continue
            last[tap.size] = [tap]
            computed = [name for name in node.inputs if name in self._producers]
            if node.kind == "elementwise" and len(computed) > 1 and all(
                self.graph.values[name].shape == tap.shape for name in computed
            ):  # fmt: skip
                sums.setdefault(tap.size, []).append(self._activated(node, tap))
        return {size: sums.get(size, taps) for size, taps in last.items()}

    def _activated(self, node: Node, tap: Tap) -> Tap:
        """The value behind the activation of a sum, where nothing else reads the sum."""
        readers = self._readers[node.outputs[0]]
        if len(readers) != 1 or readers[0].kind != "elementwise":
            return tap
        computed = [name for name in readers[0].inputs if name in self._producers]
        following = self._tap(readers[0])
        return following if len(computed) == 1 and following is not None else tap

    @cached_property
    def embedding(self) -> Tap | None:
        """What the last linear layer reads."""
        for node in reversed(self.graph.nodes):
            if node.kind == "linear" and node.inputs[0] in self._producers:
                return self._tap(self._producers[node.inputs[0]])
        return None

    @cached_property
    def map(self) -> Tap | None:
        """The map, of two or three dimensions of places, of whose places the last linear layer reads the mean."""
        node = None if self.embedding is None else self._producers[self.embedding.name]
        while node is not None and (node.kind == "reshape" or node.attributes.get("function") == "identity"):
            node = self._producers.get(node.inputs[0] or "")
        if node is None or node.kind not in ("pool", "reduce") or node.attributes["function"] != "mean":
            return None
        below = self._producers.get(node.inputs[0] or "")
        tap = None if below is None else self._tap(below)
        if tap is None or len(tap.size) < 2 or tap.axis != (1 if self._inside else len(tap.shape) - 1):
            return None
        return tap if math.prod(self.graph.values[node.outputs[0]].shape[1:]) == tap.channels else None

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """In their order."""
        return tuple(each for node in self.graph.nodes if (each := self._attention(node)) is not None)

    def tap(self, pattern: str) -> Tap:
        """The value of one layer.

        Raises
        ------
        SlimlineError : there is none of that name.
        """
        if pattern not in self.layers:
            raise unknown(f"layer of the {self.who} called", pattern, self.layers)
        return self.layers[pattern]

    def attention(self, name: str) -> Attention:
        """The attention of one layer.

        Raises
        ------
        SlimlineError : there is none in a layer of that name.
        """
        for each in self.attentions:
            if each.layer == name or each.layer.startswith(f"{name}."):
                return each
        raise unknown(f"attention of the {self.who} called", name, [each.layer for each in self.attentions])

    def names(self, attention: bool) -> list[str]:
        """Of all layers, or of those with attention."""
        return [each.layer for each in self.attentions] if attention else list(self.layers)

    def _tap(self, node: Node) -> Tap | None:
        """The value of an operator, if it is one of real numbers for every sample."""
        value = self.graph.values[node.outputs[0]]
        if len(value.shape) < 2 or value.shape[0] != self.graph.batch or not value.dtype.startswith("float"):
            return None
        return Tap(value.name, node.layer or node.name, self._axis(node), value.shape)

    def _axis(self, node: Node) -> int:
        """Where a value has its channels: as the layer has them that it comes of."""
        rank = len(self.graph.values[node.outputs[0]].shape)
        inside = 1 if self._inside and rank > 3 else rank - 1
        at: Node | None = node
        while at is not None and len(self.graph.values[at.outputs[0]].shape) == rank:
            if at.kind in _CHANNELS_INSIDE:
                return 1 if self._inside else rank - 1
            if at.kind in _CHANNELS_LAST:
                return rank - 1
            if at.kind not in _AS_ITS_INPUT:
                return inside
            at = next((self._producers[name] for name in at.inputs if name in self._producers), None)
        return inside

    def _attention(self, node: Node) -> Attention | None:
        """That of an operator that is attention, or of a softmax between two products."""
        if node.kind == "attention" and len(self.graph.values[node.outputs[0]].shape) == 4:
            query, key, value = (Heads(str(name), (0, 1, 2, 3)) for name in node.inputs[:3])
            return Attention(node.layer or node.name, None, query, key, value)
        if node.kind != "softmax" or len(self.graph.values[node.outputs[0]].shape) != 4:
            return None
        product = self._back(node.inputs[0], ("matmul", "einsum"))
        combine = next((n for n in self.graph.nodes if node.outputs[0] in n.inputs), None)
        while combine is not None and combine.kind == "elementwise":
            combine = next((n for n in self.graph.nodes if combine.outputs[0] in n.inputs), None)
        if product is None or combine is None or combine.kind != product.kind:
            return None
        positions = self.graph.values[node.outputs[0]].shape[2]
        operands = [self._unscaled(name) for name in product.inputs if name in self._producers]
        last = combine.inputs[-1]
        if len(operands) != 2 or last not in self._producers:
            return None
        names = [*(operands if product.kind == "matmul" else operands[::-1]), self._unscaled(last)]
        query, key, value = (self._heads(name, positions) for name in names)
        layer = (node.layer or node.name).removesuffix(".softmax")
        return Attention(layer, node.outputs[0], query, key, value)

    def _back(self, name: str | None, kinds: Sequence[str]) -> Node | None:
        """The nearest operator of these kinds behind operators that only scale or shift."""
        node = self._producers.get(name or "")
        while node is not None and node.kind not in kinds:
            if node.kind not in ("elementwise", "pad"):
                return None
            node = next((self._producers[each] for each in node.inputs if each in self._producers), None)
        return node

    def _unscaled(self, name: str | None) -> str:
        """The value of which this one is a multiple."""
        node = self._producers[str(name)]
        computed = [each for each in node.inputs if each in self._producers]
        if node.kind == "elementwise" and len(computed) == 1:
            return str(computed[0])
        return str(name)

    def _heads(self, name: str, positions: int) -> Heads:
        shape = self.graph.values[name].shape
        if shape[2] == positions:
            return Heads(name, (0, 1, 2, 3))
        return Heads(name, (0, 2, 1, 3) if shape[1] == positions else (0, 1, 3, 2))


def terms(step: Training, student: Model, teachers: Sequence[Model], seed: int) -> list[Term]:
    """What a step adds to the loss of the outputs.

    Raises
    ------
    SlimlineError : layers that do not exist or do not fit, nothing that could be paired, or not one teacher.
    """
    if not step.features:
        return []
    if len(teachers) != 1:
        raise SlimlineError(f"Features are learned from one teacher, and there are {len(teachers)}: name one.")
    own, other = Inside(student, "student"), Inside(teachers[0], "teacher")
    return [_term(loss, own, other, seed + index) for index, loss in enumerate(step.features)]


def _term(loss: FeatureLoss, student: Inside, teacher: Inside, seed: int) -> Term:
    if loss.loss in ("maps", "relations"):
        return _of_attention(loss, student, teacher)
    if loss.loss == "simkd":
        return _of_head(loss, student, teacher)
    if loss.layers:
        taps = [(student.tap(a), teacher.tap(b)) for a, b in _named(loss, student, teacher)]
    else:
        taps = _matched(loss, student, teacher)
    for a, b in taps:
        if loss.loss in ("hint", "attention", "fsp") and a.size != b.size:
            raise SlimlineError(
                f"{loss.loss} compares {a.layer!r} of the student, {a.size} positions, with {b.layer!r} of the "
                f"teacher, {b.size}: pair layers of the same positions."
            )
    if loss.loss == "fsp":
        return _of_flow(loss, taps, seed)
    if loss.loss == "review":
        return _of_review(loss, taps, seed)
    projections, learned = _every_projection(loss, taps, seed)
    distance = _DISTANCES[loss.loss]

    def value(xp: Any, own: Sequence[Any], other: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        parts = []
        for index, ((a, b), x, y) in enumerate(zip(taps, own, other, strict=True)):
            extra = [weights[f"{index}/{name}"] for name in projections[index]]
            parts.append(distance(xp, a.read(xp, x), b.read(xp, y), *extra))
        return loss.strength * sum(parts)

    return Term(tuple(a.name for a, _ in taps), tuple(b.name for _, b in taps), value, learned)


def _every_projection(
    loss: FeatureLoss, taps: Sequence[tuple[Tap, Tap]], seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a distance learns for every pair, and all of it by ``PAIR/NAME``."""
    projections = [_projections(loss, a, b, seed + index) for index, (a, b) in enumerate(taps)]
    return projections, {f"{i}/{name}": array for i, each in enumerate(projections) for name, array in each.items()}


def _projections(loss: FeatureLoss, student: Tap, teacher: Tap, seed: int) -> dict[str, Any]:
    """What a distance learns for one pair, in the order of its arguments."""
    if loss.loss == "hint" or (loss.loss == "fsp" and student.channels != teacher.channels):
        return dict(zip(("weight", "bias"), features.projection(student.channels, teacher.channels, seed), strict=True))
    if loss.loss == "crd":
        both = (features.projection(tap.channels, features.WIDTH, seed) for tap in (student, teacher))
        return dict(zip(("weight", "bias", "to", "shift"), (array for each in both for array in each), strict=True))
    return {}


def _of_flow(loss: FeatureLoss, taps: Sequence[tuple[Tap, Tap]], seed: int) -> Term:
    """Of the published loss, and of the student's channels projected to the teacher's where they are not as many."""
    flows = [(i, i + 1) for i in range(len(taps) - 1) if taps[i][0].size == taps[i + 1][0].size]
    if not flows:
        raise SlimlineError(
            "fsp is about the flow from one layer to the next of the same positions, and no two pairs are such: name "
            "two layers of one stage."
        )

    projections, learned = _every_projection(loss, taps, seed)

    def value(xp: Any, own: Sequence[Any], other: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        mine = [a.read(xp, x) for (a, _), x in zip(taps, own, strict=True)]
        for index in (i for i, each in enumerate(projections) if each):
            mine[index] = xp.matmul(mine[index], weights[f"{index}/weight"]) + weights[f"{index}/bias"]
        theirs = [b.read(xp, y) for (_, b), y in zip(taps, other, strict=True)]
        return loss.strength * sum(features.flow(xp, (mine[i], mine[j]), (theirs[i], theirs[j])) for i, j in flows)

    return Term(tuple(a.name for a, _ in taps), tuple(b.name for _, b in taps), value, learned)


def _of_head(loss: FeatureLoss, student: Inside, teacher: Inside) -> Term:
    """Of what the last linear layers read, where the student's is the teacher's own; of the maps before their mean is
    taken, where both have such, the larger one pooled to the size of the other."""
    own, other = student.embedding, teacher.embedding
    maps = student.map, teacher.map
    if maps[0] is not None and maps[1] is not None and len(maps[0].size) == len(maps[1].size):
        own, other = maps
    if loss.layers:
        raise SlimlineError("simkd compares what the last linear layers read: leave layers out.")
    if own is None or other is None or (own.channels, len(own.size)) != (other.channels, len(other.size)):
        raise SlimlineError("simkd is for a student that ends as its teacher does: put a TeacherHead before it.")
    pair = own, other

    def value(xp: Any, mine: Sequence[Any], theirs: Sequence[Any], _: Mapping[str, Any]) -> Any:
        (a, b), (x, y) = pair, (mine[0], theirs[0])
        one, two = features.on_smaller(xp, a.grid(xp, x), b.grid(xp, y))
        return loss.strength * xp.mean((one - two) ** 2)

    return Term((own.name,), (other.name,), value)


def _of_review(loss: FeatureLoss, taps: Sequence[tuple[Tap, Tap]], seed: int) -> Term:
    sides = {len(tap.size) for pair in taps for tap in pair}
    if sides == {0} or len(sides) > 1:
        raise SlimlineError(
            f"review compares grids of positions, and {', '.join(repr(a.layer) for a, _ in taps)} and their pairs have "
            f"{' and '.join(str(n) for n in sorted(sides))} dimensions of them: name layers with as many, the deepest "
            "last."
        )
    channels = [[tap.channels for tap in each] for each in zip(*taps, strict=True)]
    levels = features.reviewing(channels[0], channels[1], sides.pop(), seed)
    learned = {f"{i}/{name}": array for i, level in enumerate(levels) for name, array in level.items()}

    def value(xp: Any, own: Sequence[Any], other: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        mine = [a.grid(xp, x) for (a, _), x in zip(taps, own, strict=True)]
        theirs = [b.grid(xp, y) for (_, b), y in zip(taps, other, strict=True)]
        known = [{name: weights[f"{i}/{name}"] for name in level} for i, level in enumerate(levels)]
        return loss.strength * features.review(xp, mine, theirs, known)

    return Term(tuple(a.name for a, _ in taps), tuple(b.name for _, b in taps), value, learned)


def _of_attention(loss: FeatureLoss, student: Inside, teacher: Inside) -> Term:
    if loss.layers:
        pairs = [(student.attention(a), teacher.attention(b)) for a, b in _named(loss, student, teacher)]
    else:
        pairs = _spread(student.attentions, teacher.attentions)
        pairs = pairs[-1:] if loss.loss in _DEEPEST_ALONE else pairs
    if not pairs:
        bare = student if not student.attentions else teacher
        raise SlimlineError(
            f"{loss.loss} is about attention of several heads, and the {bare.who} has none: take another loss of "
            "features."
        )
    if loss.loss == "maps":
        names = [tuple(n for pair in pairs for n in pair[side].names) for side in (0, 1)]

        def value(xp: Any, own: Sequence[Any], other: Sequence[Any], _: Mapping[str, Any]) -> Any:
            every = [[each.map(xp, part) for each, part in _parted([p[side] for p in pairs], values)]
                     for side, values in ((0, own), (1, other))]  # fmt: skip
            return loss.strength * sum(features.maps(xp, a, b) for a, b in zip(*every, strict=True))

        return Term(names[0], names[1], value)
    heads = [(getattr(a, which), getattr(b, which)) for a, b in pairs for which in ("query", "key", "value")]

    def related(xp: Any, own: Sequence[Any], other: Sequence[Any], _: Mapping[str, Any]) -> Any:
        values = zip(heads, own, other, strict=True)
        return loss.strength * sum(features.relation(xp, a.read(xp, x), b.read(xp, y)) for (a, b), x, y in values)

    return Term(tuple(a.name for a, _ in heads), tuple(b.name for _, b in heads), related)


def _parted(every: Sequence[Attention], values: Sequence[Any]) -> list[tuple[Attention, Sequence[Any]]]:
    parts, start = [], 0
    for each in every:
        parts.append((each, values[start : start + len(each.names)]))
        start += len(each.names)
    return parts


def _named(loss: FeatureLoss, student: Inside, teacher: Inside) -> list[tuple[str, str]]:
    """Pairs of layers that the user names; a name or glob alone is of both networks.

    Raises
    ------
    SlimlineError : one of a pair does not exist, or globs match different numbers of layers.
    """
    attention = loss.loss in ("maps", "relations")
    pairs = []
    for entry in loss.layers:
        alone = isinstance(entry, str)
        first, second = (entry, entry) if isinstance(entry, str) else entry
        own, other = (_fitting(name, inside, attention) for name, inside in ((first, student), (second, teacher)))
        if alone and any(c in first for c in "*?["):
            own = other = [name for name in own if name in other]
        if len(own) != len(other) or not own:
            raise SlimlineError(
                f"{first!r} fits {len(own)} layers of the student and {second!r} {len(other)} of the teacher: name as "
                "many of both."
            )
        pairs += list(zip(own, other, strict=True))
    return pairs


def _fitting(pattern: str, inside: Inside, attention: bool) -> list[str]:
    if not any(c in pattern for c in "*?["):
        return [pattern]  # which may name a block with attention in it; its absence is said where it is read
    names = [name for name in inside.names(attention) if fnmatchcase(name, pattern)]
    if not names:
        raise unknown(f"layer of the {inside.who} like", pattern, inside.names(attention))
    return names


def _matched(loss: FeatureLoss, student: Inside, teacher: Inside) -> list[tuple[Tap, Tap]]:
    """Pairs of equal positions, spread evenly over the depth of both."""
    if loss.loss in _OF_SAMPLES and student.embedding is not None and teacher.embedding is not None:
        return [(student.embedding, teacher.embedding)]
    pairs: list[tuple[Tap, Tap]] = []
    for size, own in student.stages.items():
        fitting = _spread(own, teacher.stages.get(size, ()))
        pairs += fitting[-1:] if loss.loss == "review" else fitting
    if not pairs:
        raise SlimlineError(
            f"No layers of student and teacher fit each other for {loss.loss}: name pairs of layers, such as "
            f"{next(iter(student.layers), '')!r}."
        )
    return pairs[-1:] if loss.loss in _DEEPEST_ALONE else pairs


def _spread(student: Sequence[T], teacher: Sequence[T]) -> list[tuple[T, T]]:
    """As many pairs as the shorter has, at even depths of both, the last ones paired."""
    number = min(len(student), len(teacher))
    return [(student[len(student) * i // number - 1], teacher[len(teacher) * i // number - 1])
            for i in range(1, number + 1)]  # fmt: skip
