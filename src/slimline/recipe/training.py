"""What steps that train share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.config import Config
from slimline.recipe.layers import LayerPattern
from slimline.recipe.step import Step

Layer = Annotated[str, Field(min_length=1)]

_STRENGTHS = {"hint": 100.0, "attention": 1000.0, "fsp": 50.0, "similarity": 3000.0, "rkd": 25.0, "crd": 0.8}
"""Weights of the losses beside cross-entropy in Tian et al. 2020, arXiv:1910.10699; others have 1."""


class FeatureLoss(Config):
    """A distance between inner values of student and teacher, beside that of their outputs.

    Attributes
    ----------
    loss : ``hint`` (FitNets, also hidden states and embeddings of transformers; a linear projection is learned),
        ``attention`` (where squares are large; Zagoruyko and Komodakis 2017), ``fsp`` (flow between two layers;
        after Yim et al. 2017, with the student's channels projected where the teacher has not as many),
        ``similarity`` (between samples of a batch; Tung and Mori 2019), ``rkd`` (distances and angles between them;
        Park et al. 2019), ``crd`` (which sample of a batch is which, by learned projections; after Tian et al.
        2020), ``review`` (what a level and those behind it make together, learned too; ReviewKD, Chen et al. 2021),
        ``simkd`` (what the last linear layers read, of a student that ends as its teacher does, see `TeacherHead`;
        Chen et al. 2022); of transformers ``maps`` (attention distributions; MiniLM) and ``relations`` (among
        queries, keys and values; MiniLMv2).
    layers : pairs ``(student's, teacher's)`` of layers or of globs that match as many of both; one name or glob stands
        for the layers of that name in both. A name may be that of a block, whose last value is meant. None are matched:
        layers of equal positions at even depths, for ``similarity``, ``rkd``, ``crd`` and ``relations`` the last pair
        of them, for ``review`` the last of each size. Of ``review`` the deepest are last, and sizes may differ.
    weight : of it in the training loss, summed over pairs; None takes the published one.
    """

    loss: Literal["hint", "attention", "fsp", "similarity", "rkd", "crd", "review", "simkd", "maps", "relations"]
    layers: tuple[Layer | tuple[Layer, Layer], ...] = ()
    weight: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """A name alone is the loss of that name."""
        return {"loss": data} if isinstance(data, str) else data

    @property
    def strength(self) -> float:
        """`weight`, or the published one."""
        return _STRENGTHS.get(self.loss, 1.0) if self.weight is None else self.weight


class View(Config):
    """How teacher and student both see the training samples, each batch another way; needs no labels.

    Attributes
    ----------
    flip : exchange left and right of every second image.
    shift : by how many pixels images are moved at most.
    crop : least part of the area of a rectangle that is cut out and brought to the image's size; None cuts nothing.
    erase : largest part of the area of a rectangle that noise replaces in every second image.
    noise : standard deviation of normal noise, as a part of that of the inputs.
    mixup : mixes every sample with another by a part drawn from ``Beta(mixup, mixup)``: 1 is uniform, 0 mixes nothing.
        Mixed samples have no labels, so ``alpha`` has to be 1.
    """

    flip: bool = False
    shift: Annotated[int, Field(ge=0)] = 0
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    noise: Annotated[float, Field(ge=0)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0


class Training(Step):
    """What all steps that train share.

    Attributes
    ----------
    loss : ``kl`` between softened outputs, ``logit-standard`` the same with standardised logits
        (Sun et al. 2024, arXiv:2403.01427), ``dkd`` with the right class and the others apart (Zhao et al. 2022,
        arXiv:2203.08679), ``dist`` the correlation over classes and over samples (Huang et al. 2022,
        arXiv:2205.10536), ``mse`` between raw outputs. Outputs of quantities and of features are always compared by the
        squared error, those of independent labels by ``kl`` or ``mse``.
    features : losses of inner values, added to that of the outputs: names, such as ``attention``, or `FeatureLoss`.
    temperature : of the softening.
    beta : weight of the other classes in ``dkd``, where the right one weighs 1.
    output_weights : of the losses of single outputs in their sum, by the outputs' names; 1 where none is given, 0
        leaves an output out. With `features` all may be left out.
    alpha : weight of the distance to the original's outputs; ``1 - alpha`` weighs the hard labels, where there are
        any.
    epochs, batch_size : of training.
    optimizer, learning_rate, weight_decay, momentum : ``adamw`` or ``sgd`` (Nesterov momentum).
    rates : by pattern of layers a factor of the learning rate for their weights, such as 0.1 for what should change
        little, or 0 for what should stay; a layer takes that of the first pattern it fits, others have 1.
    warmup : part of all optimiser steps in which the rate rises linearly, or by a cosine for ``one-cycle``.
    schedule : of the rate after it: a ``cosine`` or a ``linear`` fall to zero, ``constant``, ``one-cycle`` (Smith
        2018), or ``plateau``, a tenth of it whenever `plateau` epochs in a row brought no better selection score.
    plateau : those epochs.
    clip : largest norm of all gradients of a step together, to which larger ones are scaled; None leaves them.
    accumulate : in how many parts each batch is computed, one after the other, to save memory. Batch norms, and losses
        between samples, see one part at a time.
    ema : decay per step of an exponential mean of the weights, such as 0.999; the mean is then what is scored and what
        stays. 0 keeps the weights themselves.
    restore_best : whether of all epochs the best on the selection split stays, that before any training among them;
        else the last one, for schedules that fall to zero and selection samples that the original knows by heart.
    view : how teacher and student both see the samples, see `View`; None as they are.
    refresh_batches : batches over which batch-norm statistics are recomputed.
    precision : ``float32``, or ``bfloat16`` for forward and backward passes where the framework has it.
    compiled : student and teachers become a program each, where the framework makes them one when it is asked (by a C++
        compiler, which has to be there): that takes long before the first step and makes the others faster. Where a
        step is compiled in any case it changes nothing.
    cache : folder in which the teacher's outputs are kept by sample, as the teacher sees it; None asks the teacher at
        every step. Not with `features`, which are inside of it, and not with ``alpha=0``, which reads none.
    """

    step: str
    loss: Literal["kl", "logit-standard", "dkd", "dist", "mse"] = "kl"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    beta: Annotated[float, Field(ge=0)] = 8.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    epochs: Annotated[int, Field(ge=0)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    rates: dict[LayerPattern, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    schedule: Literal["cosine", "linear", "constant", "one-cycle", "plateau"] = "cosine"
    plateau: Annotated[int, Field(ge=1)] = 2
    clip: Annotated[float, Field(gt=0)] | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    restore_best: bool = True
    view: View | None = None
    refresh_batches: Annotated[int, Field(ge=0)] = 16
    precision: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    features: tuple[FeatureLoss, ...] = ()
    output_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    cache: Annotated[str, Field(pattern=r"^[^\x00]+$")] | None = None

    @model_validator(mode="after")
    def _cached(self) -> Training:
        if self.cache is not None and (self.features or self.alpha == 0):
            what = "the features are inside of the network" if self.features else "with alpha 0 none are read"
            raise SlimlineError(f"cache keeps the outputs of a teacher, and {what}: leave cache out.")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train", "selection")

    @property
    def needs_gradients(self) -> bool:
        return self.epochs > 0

    @property
    def learns_from_teacher(self) -> bool:
        """Whether another network's answers are part of its loss."""
        return self.alpha > 0 or bool(self.features)

    @property
    def stops_after(self) -> int | None:
        """Epochs without a better selection score before training stops early; None never stops."""
        return None
