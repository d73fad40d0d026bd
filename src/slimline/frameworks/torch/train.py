"""Training an exported graph module: towards a teacher, and gradients for pruning criteria."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from slimline.basics.errors import SlimlineError
from slimline.basics.named import Labels, Named
from slimline.frameworks.base import Array, Batch, See, Term, answers_in_parts, in_parts, teachers_of
from slimline.frameworks.torch.compiled import Program, Store, uncompilable
from slimline.frameworks.torch.device import (
    CPU,
    computing,
    drawing,
    kind,
    move,
    place,
    random_name,
    random_of,
    seeded,
)
from slimline.frameworks.torch.native import check_batch, free_views, set_training
from slimline.frameworks.torch.norms import fold_norms
from slimline.frameworks.torch.operators import argument
from slimline.methods import distillation
from slimline.methods.outputs import Output, described, targets
from slimline.recipe.training import Training

LEARNED = "learned/"
_BATCH_NORM = torch.ops.aten.batch_norm.default
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


class TorchTrainer:
    """A copy of `native` under training, on `device` (see `slimline.frameworks.base.Trainer`).

    Weights stay float32; with ``precision="bfloat16"`` forward and backward passes run under autocast.
    Where the step is `compiled`, the student runs so while it trains, and teachers always, on batches of the size of
    the first; others, and all that is scored, run as they are.
    Images are laid out channels last, which halves the time of convolutions on CPUs. Biases, norms and
    other vectors are not decayed. A model that ends in a softmax is trained on its log-probabilities.
    What comes in and goes out is in the computer's own memory, checkpoints and the trained model too.
    """

    def __init__(
        self,
        native: fx.GraphModule,
        teacher: fx.GraphModule | tuple[fx.GraphModule, ...] | None,
        step: Training,
        seed: int,
        total_steps: int,
        device: str = CPU,
        outputs: Sequence[Output] | None = None,
    ) -> None:
        low = step.precision == "bfloat16"
        if low and kind(device) == "cuda" and not torch.cuda.is_bf16_supported():
            raise SlimlineError(f"{device} does not compute in bfloat16: choose precision float32, or device cpu.")
        if step.compiled and (reason := uncompilable(device)):
            raise SlimlineError(f"{step.step} cannot be compiled on {device}, as {reason}: leave compiled out.")
        self._source = native
        self._config = step
        self._device = device
        self._outputs = outputs
        with computing(device):
            self._student = _Fast(native, device, compiles=True if step.compiled else None)
            compiles = False if step.compiled else None
            asked = not step.features  # whose inner values are read stays as it is
            self._teachers = [_Fast(each, device, compiles, asked) for each in teachers_of(teacher)]
        self._weights = {n: p for n, p in self._student.module.named_parameters() if p.requires_grad}
        self._learned: dict[str, torch.nn.Parameter] = {}
        self._factors: dict[str, float] = {}
        self._optimizer = self._make_optimizer()
        self._random = seeded(device, seed)
        self._masks: dict[str, Tensor] = {}
        self._terms: list[Callable[[], Tensor]] = []

    def refresh(self, batches: Iterable[Batch]) -> None:
        """Set every batch norm's statistics to the mean of those of `batches`, dropout being on as in training."""
        self._student.mode(training=True)
        statistics = _Statistics(self._student.module)
        with torch.no_grad(), computing(self._device):
            for inputs, _ in batches:
                with drawing(self._device, self._random):
                    statistics.run(*self._student.tensors(inputs))
            statistics.store()

    def step(self, batch: Batch, rate: float, answers: Sequence[tuple[Array, ...]] | None = None) -> float:
        """One step of the optimiser at learning rate `rate`; the loss before it."""
        self._optimizer.zero_grad(set_to_none=True)
        self._student.mode(training=True)
        with computing(self._device):
            parts = in_parts(batch, self._config.accumulate)
            known = answers_in_parts(answers, self._config.accumulate)
            shares = [len(part[0][0]) / len(batch[0][0]) for part in parts]
            loss = sum(self._backward(*each) for each in zip(parts, shares, known, strict=False))
            for name, mask in self._masks.items():
                gradient = self._weights[name].grad
                if gradient is not None:
                    gradient.mul_(mask)
            if self._config.clip is not None:
                torch.nn.utils.clip_grad_norm_(self._trained.values(), self._config.clip)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            self._optimizer.step()
        self._zero()
        return loss

    def hold(self, masks: Mapping[str, Array]) -> None:
        """Keep weights at zero, and their moments where the mask is or was False."""
        before, self._masks = self._masks, {}
        for name, mask in masks.items():
            if name not in self._weights:  # frozen: what is zero stays so
                continue
            weight = self._weights[name]
            self._masks[name] = torch.empty_like(weight).copy_(torch.from_numpy(mask))
            stays = self._masks[name] * before.get(name, 1.0)
            for moment in self._optimizer.state[weight].values():
                if moment.shape == weight.shape:
                    moment.mul_(stays)
        self._zero()

    def pace(self, factors: Mapping[str, float]) -> None:
        """Let weights learn at so many times the rate of the others."""
        self._factors = dict(factors)
        self._optimizer = self._make_optimizer()

    def add(self, term: Term) -> None:
        """Add a term to the training loss."""
        seen = self._student.watch(term.students)
        taught = self._teachers[0].watch(term.teachers) if term.teachers else {}
        own = {name: torch.nn.Parameter(move(torch.tensor(x), self._device)) for name, x in term.learned.items()}
        self._learned |= {f"{len(self._terms)}/{name}": weight for name, weight in own.items()}
        self._optimizer = self._make_optimizer()

        def value() -> Tensor:
            students = [seen[name].float() for name in term.students]
            teachers = [taught[name].float() for name in term.teachers]
            total: Tensor = term.value(xp, students, teachers, own)
            return total

        self._terms.append(value)

    def follow(self, others: Sequence[TorchTrainer]) -> None:
        """Learn from the students of other trainers too, as they are at every step."""
        self._teachers += [other._student for other in others]

    @property
    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """All that the optimiser changes: the student's weights, and those that only serve a term of the loss."""
        return self._weights | {f"{LEARNED}{name}": weight for name, weight in self._learned.items()}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Vectors and single numbers do not decay."""
        step, groups = self._config, []
        for factor in sorted({1.0, *self._factors.values()}):
            own = [w for name, w in self._trained.items() if self._factors.get(name, 1.0) == factor]
            groups += [
                {"params": [w for w in own if w.dim() > 1], "weight_decay": step.weight_decay, "factor": factor},
                {"params": [w for w in own if w.dim() <= 1], "weight_decay": 0.0, "factor": factor},
            ]
        if step.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=step.learning_rate, fused=True)
        nesterov = step.momentum > 0
        return torch.optim.SGD(groups, lr=step.learning_rate, momentum=step.momentum, nesterov=nesterov, fused=True)

    def weights(self) -> dict[str, Array]:
        """Copies of the trainable weights."""
        return {name: _array(weight) for name, weight in self._weights.items()}

    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Replace some of the trainable weights."""
        with torch.no_grad():
            for name, array in weights.items():
                self._weights[name].copy_(torch.from_numpy(array))

    def slopes(self) -> dict[str, Array]:
        """The gradients of the last step."""
        return self._gradients()

    def gradients(self, batch: Batch) -> dict[str, Array]:
        """Of the training loss in inference mode; nothing is changed."""
        self._optimizer.zero_grad(set_to_none=True)
        self._student.mode(training=False)
        with computing(self._device):
            self._backward(batch)
        return self._gradients()

    def _gradients(self) -> dict[str, Array]:
        return {n: _array(torch.zeros_like(w) if w.grad is None else w.grad) for n, w in self._weights.items()}

    def taught(self, inputs: tuple[Array, ...]) -> list[tuple[Array, ...]]:
        """Of each teacher its outputs as the loss compares them."""
        with computing(self._device):
            parts = [self._ask(part) for part in in_parts((inputs, None), self._config.accumulate)]
        every = [zip(*each, strict=True) for each in zip(*parts, strict=True)]
        return [tuple(_array(torch.cat(output)) for output in each) for each in every]

    def _ask(self, batch: Batch) -> list[list[Tensor]]:
        """The teachers' outputs as the loss compares them."""
        inputs, labels = batch
        every = []
        with torch.no_grad(), self._low:
            for teacher in self._teachers:
                teacher.mode(training=False)
                raw = teacher(inputs)
                self._outputs = self._outputs or _described(raw, labels)
                every.append(teacher.logits(raw, self._outputs))
        return every

    @property
    def _low(self) -> torch.autocast:
        """Computes in the step's precision."""
        return torch.autocast(kind(self._device), torch.bfloat16, enabled=self._config.precision == "bfloat16")

    def loss(self, batch: Batch, answers: Sequence[tuple[Array, ...]] | None = None) -> Tensor:
        """What the student is trained to make small, on a batch and in the mode that it is in, with gradients."""
        inputs, labels = batch
        config, teachers, low = self._config, None, self._low
        if self._teachers:
            if answers is None:
                every = self._ask(batch)
            else:
                every = [[move(torch.from_numpy(x), self._device) for x in each] for each in answers]
            assert self._outputs is not None
            with torch.no_grad(), low:
                teachers = distillation.joint_teacher(xp, config.loss, self._outputs, every, config.temperature)
        with drawing(self._device, self._random), low:
            raw = self._student(inputs)
            self._outputs = self._outputs or _described(raw, labels)
            students = self._student.logits(raw, self._outputs)
        own = None if teachers is not None and config.alpha == 1 else labels
        loss: Tensor = distillation.joint(
            xp, config.loss, self._outputs, students, teachers, _targets(self._outputs, own, self._device),
            temperature=config.temperature, alpha=config.alpha, beta=config.beta,
        )  # fmt: skip
        for term in self._terms:
            loss = loss + term()
        return loss

    def _backward(self, batch: Batch, share: float = 1.0, answers: Sequence[tuple[Array, ...]] | None = None) -> float:
        """Gradients of the loss on a batch, times its share in a larger one, added to those there are; that product."""
        loss = self.loss(batch, answers)
        if share != 1:
            loss = share * loss
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _zero(self) -> None:
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._weights[name].mul_(mask)

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs of the student in inference mode, floats as float32."""
        self._student.mode(training=False)
        with torch.inference_mode(), computing(self._device):
            answers = [x.float() if x.is_floating_point() else x for x in self._student(inputs)]
            return tuple(np.asarray(x.cpu().numpy()) for x in answers)

    def state(self) -> dict[str, Array]:
        """Weights and buffers (``model/``), optimiser (``optimizer/NAME/…``) and ``random`` (of a GPU
        ``random/KIND``), all copies."""
        state = {f"model/{n}": _array(t) for n, t in self._student.module.state_dict().items()}
        state |= {f"{LEARNED}{name}": _array(weight) for name, weight in self._learned.items()}
        for name, weight in self._trained.items():
            for key, value in self._optimizer.state[weight].items():
                state[f"optimizer/{name}/{key}"] = _array(value)
        return state | {random_name(self._device): _array(self._random)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue exactly from `state`, as `state()` gave it; on another kind of device with other random numbers."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        self._random = random_of(state, self._device)
        with torch.no_grad():
            for name, tensor in self._student.module.state_dict().items():
                tensor.copy_(tensors[f"model/{name}"])
            for name, weight in self._learned.items():
                weight.copy_(tensors[f"{LEARNED}{name}"])
        self._optimizer.state.clear()
        for name, weight in self._trained.items():
            moments = {}
            for path, tensor in tensors.items():
                place, _, key = path.rpartition("/")
                if place == f"optimizer/{name}":
                    # A moment must lie in memory as its weight does: the fused optimiser pairs them by storage.
                    alike = tensor.shape == weight.shape
                    moments[key] = torch.empty_like(weight).copy_(tensor) if alike else tensor.to(weight.device)
            if moments:
                self._optimizer.state[weight] = moments

    def native(self) -> fx.GraphModule:
        """A copy of the model that was given, with the student's weights and statistics."""
        module = copy.deepcopy(self._source)
        trained = self._student.module.state_dict()
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                tensor.copy_(trained[name])
        return module

    def network(self, see: See | None) -> Taught:
        """The student, to be trained in a loop of the user's own."""
        return Taught(self, self._student, self._learned, see)


class Taught(torch.nn.Module):
    """A student in a loop of the user's own: ``net.loss(x, labels).backward()``, and ``net(x)`` gives its outputs.

    ``net(x, loss=True, labels=labels)`` is that loss too, for engines that wrap `forward`, such as
    `torch.nn.parallel.DistributedDataParallel`. Its parameters are those of the student that are trained, and what
    terms of the loss learn beside them.
    """

    def __init__(
        self, trainer: TorchTrainer, student: _Fast, learned: Mapping[str, torch.nn.Parameter], see: See | None
    ) -> None:
        super().__init__()
        self.student = student.module
        self.learned = torch.nn.ParameterList(learned.values())
        self._trainer, self._mode, self._see, self._batches = trainer, student.mode, see, 0

    def forward(self, *inputs: Tensor, loss: bool = False, labels: Any = None) -> Any:
        """What the student answers, as its own structure has it, or `loss`."""
        return self.loss(inputs, labels) if loss else self.student(*inputs)

    def train(self, mode: bool = True) -> Taught:
        """Switch batch norm and dropout."""
        self._mode(mode)
        self.training = mode
        return self

    def loss(self, inputs: Any, labels: Any = None) -> Tensor:
        """What the step would make small, with gradients; in training mode on the next view of the inputs.

        Parameters
        ----------
        inputs : a tensor ``(batch, …)``, or of several inputs a tuple.
        labels : class numbers, or of the output's shape where these are no classes; None has none. Of several outputs
            a tuple, in their order.
        """
        x = tuple(_array(each) for each in (inputs if isinstance(inputs, tuple | list) else (inputs,)))
        several = isinstance(labels, tuple | list)
        y = Named([_array(each) for each in labels]) if several else None if labels is None else _array(labels)
        if self.training:
            self._batches += 1
            x = x if self._see is None else self._see(x, self._batches)
        return self._trainer.loss((x, y))


def gradients(
    native: fx.GraphModule,
    batches: Iterable[Batch],
    loss: str,
    see: Callable[[Mapping[str, Array]], None] | None = None,
    device: str = CPU,
    outputs: Sequence[Output] | None = None,
) -> dict[str, Array]:
    """Mean gradient over `batches` of each weight, frozen ones too, by name, in inference mode, float32.

    Parameters
    ----------
    loss : ``cross_entropy``, of each output the loss that its labels have, or ``norm``: the mean over samples of half
        the squared norm of all outputs, for data without labels.
    see : told the gradient of every batch.
    device : on which they are computed; they come back from it.
    outputs : what each means; None leaves that to the labels of the first batch.
    """
    model = _Fast(native, device)
    weights = {n: p.requires_grad_() for n, p in model.module.named_parameters() if p.is_floating_point()}
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    count = 0
    for inputs, labels in batches:
        with computing(device):
            raw = model(inputs)
            if loss == "norm":
                norms = [0.5 * x.square().sum() / len(x) for x in raw if x.is_floating_point()]
                value = sum(norms[1:], norms[0])
            elif labels is None:
                raise SlimlineError("The cross_entropy gradient needs labels: give labelled data or use the norm.")
            else:
                outputs = outputs or _described(raw, labels)
                own = _targets(outputs, labels, device)
                value = distillation.joint(xp, "kl", outputs, model.logits(raw, outputs), None, own)
            slopes = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        now = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), slopes, strict=True)}
        for name, gradient in now.items():
            sums[name] += gradient
        if see is not None:
            see({name: _array(gradient) for name, gradient in now.items()})
        count += 1
    if count == 0:
        raise SlimlineError("Gradients need at least one batch of data: give calibration or training data.")
    return {name: _array(total / count) for name, total in sums.items()}


def answers(native: fx.GraphModule, batches: Iterable[tuple[Array, ...]], device: str) -> list[tuple[Array, ...]]:
    """All outputs in inference mode for every batch, as stored; of bfloat16 float32."""
    arrays = []
    with computing(device):
        model = _Fast(native, device)
    with torch.inference_mode(), computing(device):
        for batch in batches:
            outputs = [x.float() if x.dtype == torch.bfloat16 else x for x in model(batch)]
            arrays.append(tuple(x.cpu().numpy() for x in outputs))
    return arrays


def _described(raw: Sequence[Tensor], labels: Labels) -> tuple[Output, ...]:
    """What the outputs mean, as far as they and the labels of a batch tell."""
    bare = [Output(name=str(i), shape=tuple(x.shape), dtype=_dtype(x)) for i, x in enumerate(raw)]
    return described(bare, labels, channels_first=True)


def _dtype(tensor: Tensor) -> str:
    """Numpy's name of it; bfloat16 counts as float32, as which it leaves."""
    return "float32" if tensor.dtype == torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")


def _targets(outputs: Sequence[Output], labels: Labels, device: str) -> list[Tensor | None]:
    """The labels of each output, on the device."""
    own = targets(outputs, labels)
    return [None if x is None else move(torch.from_numpy(np.ascontiguousarray(x)), device) for x in own]


def _keep_from_overflow(module: fx.GraphModule) -> None:
    """Give convolutions whose gradients would be written past their end inputs that are not channels last.

    On processors without AVX-512 oneDNN does so in 1x1 convolutions with a stride whose inputs do not fill a vector of
    8 channels (torch 2.13: wrong numbers, or a crash later on; found by comparing with mkldnn switched off). It takes
    for channels last what only has such strides, as images of one channel have, so a copy has to set them.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return
    held = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers()])
    plain: dict[str, Any] = {"memory_format": torch.contiguous_format}
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        weight, stride = node.args[1], argument(node, "stride")
        stored = held.get(str(weight.target)) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
        if set(stride) != {1} and (stored is None or (tuple(stored.shape[2:]) == (1, 1) and stored.shape[1] % 8)):
            with module.graph.inserting_before(node):
                copies = [module.graph.call_function(torch.ops.aten.clone.default, (x,), plain) for x in node.args[:2]]
            node.args = (*copies, *node.args[2:])
    module.recompile()


class _Fast:
    """A copy of a graph module on a device, laid out for speed: channels last where it has 2-D convolutions.

    ``model(inputs)`` gives all its outputs.

    Parameters
    ----------
    compiles : in which mode it is compiled, training or not; None never.
    asked : whether it will only be asked for its outputs, in inference mode: then norms become a part of convolutions.
    """

    def __init__(
        self, native: fx.GraphModule, device: str = CPU, compiles: bool | None = None, asked: bool = False
    ) -> None:
        self.module = copy.deepcopy(native)
        self._device = device
        self._compiles = compiles
        self._program: Program | None = None
        self._stores: list[Store] = []
        self._training = False
        set_training(self.module, False)
        if asked:
            fold_norms(self.module)
        targets = {node.target for node in self.module.graph.nodes}
        self._images = torch.ops.aten.conv2d.default in targets and kind(device) != "mps"
        if device == CPU:
            _keep_from_overflow(self.module)
        free_views(self.module)
        self._finals = _finals(self.module)
        if self._images:
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        place(self.module, device)

    def watch(self, values: Collection[str]) -> dict[str, Tensor]:
        """A dict that holds these values, by the names of fx nodes, of the last forward pass."""
        seen: dict[str, Tensor] = {}

        def see(name: str, value: Tensor) -> None:
            seen[name] = value

        self._stores.append(see)
        self._program = None
        for node in [node for node in self.module.graph.nodes if node.name in values]:
            with self.module.graph.inserting_after(node):
                self.module.graph.call_function(see, (node.name, node))
        self.module.recompile()
        return seen

    def mode(self, training: bool) -> None:
        """Switch batch norm and dropout, if that is not how they are."""
        if training != self._training:
            set_training(self.module, training)
            self._training = training

    def tensors(self, inputs: tuple[Array, ...]) -> list[Tensor]:
        """The inputs as tensors, images channels last."""
        check_batch(self.module, inputs)
        tensors = [move(torch.from_numpy(np.ascontiguousarray(x)), self._device) for x in inputs]
        return [
            x.contiguous(memory_format=torch.channels_last) if self._images and x.dim() == 4 else x for x in tensors
        ]

    def __call__(self, inputs: tuple[Array, ...]) -> list[Tensor]:
        tensors = self.tensors(inputs)
        if self._training == self._compiles and self._program is None:
            self._program = Program(self.module, self._stores)
        if self._training == self._compiles and self._program is not None and self._program.fits(tensors):
            leaves = self._program(*tensors)
        else:
            leaves = pytree.tree_leaves(self.module(*tensors))
        return [x for x in leaves if isinstance(x, Tensor)]

    def logits(self, raw: Sequence[Tensor], outputs: Sequence[Output]) -> list[Tensor]:
        """The outputs as losses compare them: float32, logits of those that are probabilities."""
        return [_logits(*each) for each in zip(raw, outputs, self._finals, strict=True)]


def _logits(raw: Tensor, output: Output, final: Any) -> Tensor:
    real = raw.float() if raw.is_floating_point() else raw
    tiny = torch.finfo(torch.float32).tiny
    if output.kind == "classes" and final in _SOFTMAX:
        return real.clamp_min(tiny).log()
    if output.kind == "multilabel" and final == torch.ops.aten.sigmoid.default:
        return real.clamp_min(tiny).log() - (1 - real).clamp_min(torch.finfo(torch.float32).eps).log()
    return real


def _finals(module: fx.GraphModule) -> list[Any]:
    """The operator that computes each output."""
    (output,) = module.graph.find_nodes(op="output")
    return [node.target for node in pytree.tree_leaves(output.args[0]) if isinstance(node, fx.Node)]


class _Statistics(fx.Interpreter):
    """Runs the graph in training mode and averages the batch statistics that its batch norms see."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._sums: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator; a batch norm leaves its statistics here instead of mixing them into the old ones."""
        operands: Any = n.args
        if n.target is not _BATCH_NORM or operands[3] is None:
            return super().run_node(n)
        (x, weight, bias, *_, eps, _), _ = self.fetch_args_kwargs_from_env(n)
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1])
        for buffer, value in zip(operands[3:5], (mean, variance), strict=True):
            self._sums.setdefault(buffer.target, []).append(value)
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, False)

    def store(self) -> None:
        """Write the averages to the buffers of the graph."""
        for name, values in self._sums.items():
            self.fetch_attr(name).copy_(torch.stack(values).mean(0))


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().contiguous().numpy())
