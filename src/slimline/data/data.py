"""The user's data, and the four roles its samples play.

Training teaches, calibration sets ranges, selection chooses between candidates, certification proves the
result and is used for nothing else. No sample has two of these roles, except that calibration may come
from the training samples.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from slimline.basics.arguments import whole
from slimline.basics.arrays import Array, Example, is_array
from slimline.basics.errors import SlimlineError, unknown
from slimline.basics.named import Labels, Named, parts
from slimline.data import matching, repeats
from slimline.data.classes import check_classes, class_numbers
from slimline.data.proof import Proof
from slimline.data.splits import (
    Augment,
    Batch,
    Inputs,
    Spec,
    Split,
    Stream,
    as_batch,
    concatenate,
    reading,
    specs_of,
)
from slimline.graph.ir import InputSpec
from slimline.measure.accuracy import Metric
from slimline.measure.certificate import check_range
from slimline.measure.set_metrics import SetMetric
from slimline.methods.outputs import IGNORED, Output, aligned, declared, described

log = logging.getLogger(__name__)

Role = Literal["train", "calibration", "selection", "certification"]
ROLES = ("train", "calibration", "selection", "certification")
Overlap = Literal["refuse", "drop", "allow"]
OVERLAPS = ("refuse", "drop", "allow")

CALIBRATION = 512
SELECTION = 5000
_LOOK = 64  # labels that tell of which kind they are


class Data:
    """Samples for a compression, in four roles.

    Parameters
    ----------
    train, test, calibration, selection : each ``(x, y)``, ``(x,)`` or ``x``, where ``x`` is an array or tensor
        ``(samples, …)``, or of several inputs a tuple of them, or a dict by the inputs' names in any order, and ``y``
        the labels of the first output, or a tuple or dict of those of several (`docs/outputs.md`); or a
        ``DataLoader``, a ``tf.data.Dataset`` or any collection of batches ``(x, y)`` or ``x`` that can be read more
        than once.
        Test samples certify. Selection defaults to a tenth of train, at most 5,000, which are then not trained
        on; calibration to 512 of train. Without train (or for a streamed train, selection) they are cut from test.
    metric : score of each sample, ``metric(outputs, labels) -> (samples,)``, higher is better; needed where labels
        are not classes. Of a model with several outputs it gets all, by position or name (``outputs["age"]``). Default:
        whether the largest output is the label's, the mean over positions and over outputs with labels. Booleans are
        right and wrong. For a metric of the whole set ``SetMetric(f)``, or a name: ``f1_macro``, ``miou``, ``auc``,
        ``mean_average_precision``, ``perplexity`` (scored as its negative), ``pearson``, ``spearman``; its drop is
        measured, not certified.
    metric_range : the lowest and the highest score that the metric can give a sample, ``(0, 1)`` say. Without it a
        metric that is not boolean is measured, and no drop of it is certified (`docs/certificates.md`).
    augment : ``augment(x, rng) -> x``, applied to training batches: an array in and out where there is one input, a
        tuple of arrays where there are several, a dict where they have names.
    groups : which samples depend on each other (one speaker, one patient, overlapping windows): a label per test
        sample, or a dict ``{"test": labels, "train": labels}``. A certificate counts each group once, and no group
        is divided between splits.
    overlap : what to do about test samples that are among the train, calibration or selection samples: ``refuse`` to
        certify, ``drop`` them from the certificate, or ``allow`` them, where equal samples are no copies; copies
        within the test samples are then counted too, else once.
    outputs : what outputs mean where their labels leave a choice, such as ``{"mask": sl.Output(axis=1), "tags":
        "multilabel"}``; a tuple goes by position, a single one is of the first output.
    seed : of the cuts.
    classes : number of classes, if labels should be checked before a model is known.

    Floats become float32; one-hot labels become class numbers. A streamed train split is read anew in every
    epoch, everything else is held in memory.

    Raises
    ------
    SlimlineError : empty, NaN or infinite data, lengths that differ, labels that are out of range, all equal, or no
        classes while there is no metric.
    """

    def __init__(
        self,
        train: Any = None,
        test: Any = None,
        calibration: Any = None,
        selection: Any = None,
        *,
        metric: Metric | str | None = None,
        metric_range: tuple[float, float] | None = None,
        augment: Augment | None = None,
        groups: Any = None,
        overlap: Overlap = "refuse",
        outputs: Any = None,
        seed: int = 0,
        classes: int | None = None,
    ) -> None:
        self.metric = _metric(metric)
        if augment is not None and not callable(augment):
            raise SlimlineError(f"augment is a {type(augment).__name__}: give a function.")
        if metric_range is not None and isinstance(self.metric, SetMetric):
            raise SlimlineError(
                "metric_range is of a sample's score, and a metric of the whole set has none: leave it out, or give a "
                "metric of each sample."
            )
        if metric_range is not None and metric is None:
            raise SlimlineError("metric_range is of a metric of your own: give metric too, or leave it out.")
        if overlap not in OVERLAPS:
            raise unknown("way to treat an overlap", str(overlap), OVERLAPS)
        self.metric_range = None if metric_range is None else check_range(metric_range)
        self.augment = augment
        self.overlap = overlap
        self.seed = whole(seed, "seed", 0, 2**32)
        self.classes = None if classes is None else whole(classes, "classes", 1, 2**31)
        self.declared = declared(outputs)
        self._groups = _groupings(groups)
        sources = {"train": train, "test": test, "calibration": calibration, "selection": selection}
        self._sources: dict[str, Split | Stream] = {k: self._read(k, v) for k, v in sources.items() if v is not None}
        if not self._sources:
            raise SlimlineError("There is no data: give Data at least train=(x, y) or test=(x, y).")
        if len({s.names for s in self._sources.values()}) > 1:
            names = "; ".join(f"{name} {', '.join(split.names) or 'none'}" for name, split in self._sources.items())
            raise SlimlineError(f"The splits have inputs of different names ({names}): name them alike.")
        if len({len(s.specs) for s in self._sources.values()}) > 1:
            counts = ", ".join(f"{name} {len(split.specs)}" for name, split in self._sources.items())
            raise SlimlineError(f"The splits have different numbers of inputs ({counts}): they must agree.")
        self._splits = self._cut()
        self.dropped = 0
        if overlap == "drop":
            self._drop()

    def split(self, name: Role) -> Split | Stream:
        """The samples of a role, with ``.inputs``, ``.labels``, ``len()`` and ``.batches(size, seed, epoch)``."""
        if name not in ROLES:
            raise unknown("split", name, ROLES)
        if name not in self._splits:
            source = "test" if name == "certification" else "train" if name == "train" else "train or test"
            raise SlimlineError(f"This needs {name} samples: give Data {source}=(x, y).")
        return self._splits[name]

    def has(self, name: Role) -> bool:
        """Whether there are samples of a role."""
        return name in self._splits

    def example(self, samples: int = 2) -> Inputs:
        """The inputs of the first few samples."""
        return next(next(iter(self._splits.values())).batches(samples))[0]

    def example_by_name(self, samples: int = 2) -> Example:
        """The same, as a dict where inputs were given by name."""
        names = next(iter(self._splits.values())).names
        inputs = self.example(samples)
        return dict(zip(names, inputs, strict=True)) if names else inputs

    @property
    def labelled(self) -> bool:
        """Whether the samples that certify (or, without any, the others) have labels."""
        split = self._splits.get("certification") or next(iter(self._splits.values()))
        return (next(split.batches(1))[1] if isinstance(split, Stream) else split.targets) is not None

    def check(
        self,
        inputs: Sequence[InputSpec],
        batch: int | None = None,
    ) -> Data:
        """This data as a model takes it: inputs in its order, shapes checked, integers cast where it wants floats.

        Parameters
        ----------
        inputs : what the model or the artifact takes.
        batch : samples in a calibration batch; fewer calibration samples are refused.
        """
        taken = {name: matching.ordered(split, inputs) for name, split in self._splits.items()}
        for split in taken.values():
            dtypes = matching.matched(split, inputs)
        if batch is not None and self.has("calibration") and len(self._splits["calibration"]) < batch:
            raise SlimlineError(
                f"Calibration has {len(self._splits['calibration'])} samples, fewer than a batch of {batch}: "
                "give more, or set a smaller batch_size."
            )
        for (_, dtype), spec in zip(split.specs, inputs, strict=True):
            if np.dtype(dtype).kind in "iub" and np.dtype(spec.dtype).kind == "f":
                log.warning(
                    "Input %s is %s and is cast to the %s the model takes, unscaled.", spec.name, dtype, spec.dtype
                )
        matched = copy.copy(self)
        matched._splits = {name: replace(split, dtypes=dtypes) for name, split in taken.items()}
        return matched

    def check_labels(self, outputs: Sequence[Output]) -> None:
        """Refuse labels that do not fit the outputs of a model, called by name, with shapes and dtypes.

        Raises
        ------
        SlimlineError : labels of other shapes, class numbers out of range, splits whose labels are of different kinds.
        """
        splits = [split for split in self._splits.values() if isinstance(split, Split)]
        kinds_by_split = {split.name: self._kinds(split, outputs) for split in splits}
        for index, output in enumerate(outputs):
            kinds = {name: each[index].sentence() for name, each in kinds_by_split.items() if each[index].labelled}
            if len(set(kinds.values())) > 1:
                listed = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
                raise SlimlineError(
                    f"The labels of {output.name!r} are of different kinds ({listed}): make them alike, or give Data "
                    f"outputs={{{output.name!r}: KIND}}."
                )

    def describe(
        self, outputs: Sequence[Output], channels_first: bool, role: Role = "train", lenient: bool | None = None
    ) -> tuple[Output, ...]:
        """What the outputs of a model mean by the labels of a role.

        Parameters
        ----------
        outputs : with names, shapes and dtypes.
        channels_first : where dense outputs without labels have their channels.
        lenient : whether labels that fit no output are none; by default where the user's own metric reads them.
        """
        own = next(self.split(role).batches(_LOOK))[1]
        lenient = self.metric is not None if lenient is None else lenient
        return described(outputs, own, self.declared, channels_first=channels_first, lenient=lenient)

    def _kinds(self, split: Split, outputs: Sequence[Output]) -> tuple[Output, ...]:
        """What outputs mean by the labels of a split, whose class numbers have to be in range."""
        if self.metric is not None:
            return described(outputs, split.labels, self.declared, lenient=True)
        kinds = described(outputs, split.labels, self.declared)
        for output, own in zip(kinds, aligned(split.labels, outputs), strict=True):
            if own is not None and output.labelled and output.kind == "classes" and output.axis is not None:
                counted = own[own != IGNORED] if output.ignores else own
                check_classes(counted, output.shape[output.axis], split.name)
        return kinds

    def fingerprint(self) -> str:
        """SHA-256 over the arrays and the seed, in hex; of a stream, its length, shapes and dtypes only."""
        facts: tuple[Any, ...] = (self.seed, self.metric is None, self.augment is None)
        if self.metric_range is not None or self._groups or self.overlap != "refuse":
            facts += (self.metric_range, self.overlap)
        if self.declared:
            facts += (sorted((str(key), output.kind, output.axis) for key, output in self.declared.items()),)
        digest = hashlib.sha256(repr(facts).encode())
        for name, split in sorted(self._sources.items()):
            digest.update(repr((name, len(split), split.specs)).encode())
            if isinstance(split, Split):
                for array in (*split.source, *(a for a in parts(split.targets) if a is not None)):
                    digest.update(np.ascontiguousarray(array).data.cast("B"))
                if isinstance(split.targets, Named):
                    labelled = [a is not None for a in split.targets]
                    digest.update(repr((split.targets.names, labelled)).encode())
                if split.grouping is not None:
                    digest.update("\0".join(split.grouping.tolist()).encode())
        return digest.hexdigest()

    def overlaps(self) -> dict[str, int]:
        """How many certification samples are among the samples of each other role, or in groups that are."""
        shared = self._shared()
        return {name: int(rows.sum()) for name, rows in shared.items() if rows.any()}

    def refuse_overlap(self) -> None:
        """Raise the error that says which test samples were used before, unless the user allowed that."""
        overlaps = self.overlaps() if self.overlap == "refuse" else {}
        if overlaps:
            test = self._splits["certification"]
            counts = " and ".join(f"{count:,} are among the {name} samples" for name, count in overlaps.items())
            raise SlimlineError(
                f"Of the {len(test):,} test samples {counts} or in their groups, so they prove nothing: take them out, "
                "or give Data overlap='drop' to leave them out of the certificate, or overlap='allow' if equal samples "
                "are no copies."
            )

    def proof(self) -> Proof:
        """The certification samples as a certificate counts them."""
        split = self._splits["certification"]
        assert isinstance(split, Split)
        index, notes = np.arange(len(split)), []
        if self.overlap != "allow":
            index = repeats.originals(split.keys)
        else:
            overlaps = self.overlaps()
            notes += [
                f"{n:,} of the samples are also among the {role} ones, as allowed." for role, n in overlaps.items()
            ]
        if self.dropped:
            notes.append(f"{self.dropped:,} test samples that were used before are left out.")
        groups = None if split.groups is None else split.groups[index]
        return Proof(index, groups, len(split) - len(index), split.keys[index], tuple(notes))

    def _shared(self) -> dict[str, Array]:
        """For every other role the certification samples that occur there too, as a mask."""
        test = self._splits.get("certification")
        if not isinstance(test, Split):
            return {}
        sources = {k: s for k, s in self._sources.items() if k != "test"}
        shared = {name: np.isin(test.keys, split.keys) for name, split in sources.items()}
        train = self._sources.get("train")
        if test.groups is not None and isinstance(train, Split) and train.groups is not None:
            shared["train"] |= np.isin(test.groups, train.groups)
        return shared

    def _drop(self) -> None:
        test = self._splits.get("certification")
        if not isinstance(test, Split):
            return
        away = np.any([np.zeros(len(test), bool), *self._shared().values()], axis=0)
        if away.all():
            raise SlimlineError("Every test sample is among the others: give test samples that were not used before.")
        self.dropped = int(away.sum())
        if self.dropped:
            log.info("%d test samples that are among the others are left out of the certificate.", self.dropped)
            self._splits["certification"] = test.take(np.flatnonzero(~away))

    def _read(self, name: str, source: Any) -> Split | Stream:
        """One given split, checked; a collection of batches is read into memory unless it is for training."""
        specs: tuple[Spec, ...] = ()
        names: tuple[str, ...] = ()
        grouping = self._groups.get(name)
        if is_array(source) or isinstance(source, tuple | dict):
            inputs, labels, names = as_batch(source, name)
            if grouping is not None:
                grouping = repeats.names(grouping, len(inputs[0]), name)
            return Split(name, inputs, self._labels(labels, name), names=names, grouping=grouping)
        if not hasattr(source, "__iter__") or isinstance(source, str | bytes):
            raise SlimlineError(
                f"The {name} data is a {type(source).__name__}: give (x, y), a DataLoader, a tf.data.Dataset or a list "
                "of batches."
            )
        if isinstance(source, Iterator):
            raise SlimlineError(f"The {name} data can be read only once: give a list of batches, not a generator.")
        if grouping is not None:
            raise SlimlineError(f"Groups need the {name} data as arrays, a label per sample: give {name}=(x, y).")
        read: list[Batch] = []
        hashes: list[Array] = []
        count = 0
        for batch in reading(source, name):
            x, y, batch_names = as_batch(batch, name, loaded=True)
            names = names if read else batch_names
            if batch_names != names:
                raise SlimlineError(f"The batches of the {name} data have inputs of different names: name them alike.")
            specs = specs_of(x) if not read else specs
            if specs_of(x) != specs:
                raise SlimlineError(
                    f"The batches of the {name} data differ in shape or dtype: make them alike, or, for whole "
                    "arrays, give a tuple (x, y)."
                )
            count += len(x[0])
            if name == "train":
                hashes.append(repeats.keys(x))
            read.append((() if name == "train" else x, y))
        if not read:
            raise SlimlineError(f"The {name} data is empty: give at least one sample.")
        inputs, labels = concatenate(read)
        labels = self._labels(labels, name)
        if name == "train":
            seen = np.unique(np.concatenate(hashes))
            return Stream(
                name, source, self._class_numbers, count, specs, names, labelled=labels is not None, keys=seen
            )
        return Split(name, inputs, labels, names=names)

    def _class_numbers(self, labels: Labels) -> Labels:
        if self.metric is not None:
            return labels
        if isinstance(labels, Named):
            return Named([None if a is None else class_numbers(a) for a in labels], labels.names)
        return None if labels is None else class_numbers(labels)

    def _labels(self, labels: Labels, where: str) -> Labels:
        """Labels in the form that scores and losses take, checked."""
        labels = self._class_numbers(labels)
        if self.metric is not None:
            return labels
        for index, own in enumerate(parts(labels)):
            of = ""
            if isinstance(labels, Named):
                of = f" of {labels.names[index]!r}" if labels.names else f" of output {index}"
            if own is None:
                continue
            if own.dtype.kind == "f":
                raise SlimlineError(
                    f"The {where} labels{of} are {own.dtype}, not classes: cast class labels to integers, or give Data "
                    "a metric(outputs, labels)."
                )
            if len(own) > 1 and bool((own == own.flat[0]).all()):
                raise SlimlineError(f"All {where} labels{of} are {own.flat[0]}: accuracy needs at least two classes.")
            if self.classes is not None and index == 0:
                check_classes(own, self.classes, where)
        return labels

    def _cut(self) -> dict[str, Split | Stream]:
        """The given splits as roles; what was not given is cut from train or from test."""
        rng = np.random.default_rng(self.seed)
        splits: dict[str, Split | Stream] = {}
        train, test = self._sources.get("train"), self._sources.get("test")
        missing = [name for name in ("calibration", "selection") if name not in self._sources]
        for name in ("calibration", "selection"):
            if name in self._sources:
                splits[name] = self._sources[name]
        if isinstance(train, Split):
            held = min(SELECTION, max(1, len(train) // 10)) if "selection" in missing else 0
            if train.groups is None:
                order = rng.permutation(len(train))
                chosen, remaining = order[:held], order[held:]
            elif held:
                chosen, remaining = repeats.divide(len(train), repeats.units(None, train.groups), [held], rng)
            else:
                chosen, remaining = np.empty(0, int), np.arange(len(train))
            if not len(remaining):
                what = "a single sample" if train.groups is None else "a single group"
                raise SlimlineError(f"The train data has {what}: give more, or give selection=(x, y) too.")
            splits["train"] = replace(train, index=np.sort(remaining), augment=self.augment)
            if held:
                splits["selection"] = replace(train, name="selection", index=np.sort(chosen))
            if "calibration" in missing:
                few = remaining if train.groups is None else rng.permutation(remaining)
                splits["calibration"] = replace(train, name="calibration", index=np.sort(few[:CALIBRATION]))
        elif isinstance(train, Stream):
            splits["train"] = replace(train, augment=self.augment)
            if "calibration" in missing:
                inputs, labels = next(train.batches(CALIBRATION))
                splits["calibration"] = Split("calibration", inputs, labels, names=train.names)
        if isinstance(test, Split):
            absent = [name for name in missing if name not in splits]
            units = repeats.units(None, test.groups)
            if absent and self.overlap != "allow":
                together = repeats.units(test.keys, test.groups)
                # Data of next to no distinct samples, such as zeros, cannot be cut between them.
                units = units if together is None or len(np.unique(together)) < 10 else together
            splits |= _from_test(test, absent, units, rng)
        return splits


def _metric(metric: Any) -> Metric | None:
    """The metric as it is called, of a function, a `SetMetric` or the name of one."""
    if isinstance(metric, str):
        from slimline.measure.named_metrics import NAMED

        if metric not in NAMED:
            raise unknown("metric", metric, NAMED)
        return NAMED[metric]
    if metric is not None and not isinstance(metric, SetMetric) and not callable(metric):
        raise SlimlineError(f"metric is a {type(metric).__name__}: give a function, a SetMetric or a name.")
    checked: Metric | None = metric
    return checked


def _groupings(groups: Any) -> dict[str, Any]:
    """The labels of groups by the name of the data they are of."""
    by_name = groups if isinstance(groups, dict) else {} if groups is None else {"test": groups}
    for name in by_name:
        if name not in ("test", "train"):
            raise unknown("data with groups called", str(name), ("test", "train"))
    return {name: labels for name, labels in by_name.items() if labels is not None}


def _from_test(test: Split, missing: Sequence[str], units: Array | None, rng: np.random.Generator) -> dict[str, Split]:
    """The certification split, and what is missing besides, cut from the test data."""
    if not missing:
        return {"certification": replace(test, name="certification")}
    limits = {"calibration": CALIBRATION, "selection": SELECTION}
    sizes = {name: min(limits[name], max(1, len(test) // 5)) for name in missing}
    if sum(sizes.values()) >= len(test):
        raise SlimlineError(
            f"The test data has {len(test)} samples, too few to be cut for {' and '.join(missing)}: give train=(x, y)."
        )
    indices = repeats.divide(len(test), units, list(sizes.values()), rng)
    if not all(len(index) for index in indices):
        raise SlimlineError(
            f"The test data has too few groups to be cut for {' and '.join(missing)}: give train=(x, y)."
        )
    names = [*sizes, "certification"]
    pieces = {name: replace(test, name=name, index=index) for name, index in zip(names, indices, strict=True)}
    sizes_text = ", ".join(f"{len(piece)} for {name}" for name, piece in pieces.items())
    log.info("The %d test samples are divided, as there is no other data for it: %s.", len(test), sizes_text)
    return pieces


def is_data(name: str, value: Any) -> None:
    """Refuse an argument that is no `Data`; see `slimline.basics.arguments.takes`."""
    if not isinstance(value, Data):
        raise SlimlineError(
            f"{name} is a {type(value).__name__}: give slimline.Data, such as slimline.Data(train=(x, y), test=(x, y))."
        )
