"""Torch on a device of the tester's, on a pretended GPU, and the choice between them.

`device` is real (the CPU where `SLIMLINE_TEST_DEVICE` names no other). Where there is no GPU, torch's ``meta`` device
stands in for one: it has no numbers, but as on a GPU whatever is left on the CPU does not mix with it.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.evidence.grams import collect
from slimline.frameworks.base import Term, adapter
from slimline.frameworks.device import using
from slimline.frameworks.torch import device as devices
from slimline.frameworks.torch import observe as observing
from slimline.frameworks.torch import train
from slimline.frameworks.torch.observe import observe
from slimline.frameworks.torch.train import TorchTrainer, gradients
from slimline.graph.matrix import matrices
from slimline.methods.activations import l1
from slimline.steps.distillation.step import Distillation

X = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)
Y = np.arange(16) % 5


class Net(nn.Module):
    """Makes tensors of its own in many ways; batch norm, dropout, a constant, a buffer, a tied weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.places = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 5)
        self.again = nn.Linear(8, 5)
        self.again.weight = self.head.weight
        self.register_buffer("shift", torch.linspace(0, 1, 8))

    def forward(self, x):
        y = self.drop(self.norm(self.conv(x)).relu()).mean(2).transpose(1, 2)
        y = y + self.places(torch.arange(y.shape[1])) + self.shift + torch.tensor([0.5]) + torch.zeros(8)
        mask = torch.full((8, 8), float("-inf")).triu(1) + torch.ones(8, 8, dtype=torch.float32)
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask).mean(1)
        return self.head(y) + self.again(y) * y.new_ones(5) + torch.zeros_like(y)[:, :5]


@pytest.fixture
def native():
    torch.manual_seed(0)
    return adapter("torch").load(Net().eval(), (X[:2],))[0]


# The choice.


def there(monkeypatch, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("cuda", "mps", "best"), [(2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")])
def test_cuda_comes_before_mps_and_that_before_the_cpu(monkeypatch, cuda, mps, best):
    there(monkeypatch, cuda, mps)
    assert adapter("torch").device(None) == best


def test_what_torch_does_not_find_is_refused(monkeypatch):
    there(monkeypatch, 0, False)
    for name, title in (("cuda", "CUDA"), ("mps", "MPS")):
        with pytest.raises(SlimlineError, match=f"There is no {title} device here: leave device out, or choose cpu."):
            adapter("torch").device(name)


# On the device there is.


def test_training_there_gives_what_the_cpu_gives(device, native):
    device = adapter("torch").device(device)
    found = {}
    for name in ("cpu", device):
        trainer = TorchTrainer(native, None, Distillation(alpha=0.0), 3, 4, name)
        trainer.refresh([((X,), Y)])
        found[name] = [trainer.step(((X,), Y), 1e-3)], trainer.gradients(((X,), Y)), trainer.native()
        assert all(t.device.type == "cpu" for t in found[name][2].state_dict().values())
        assert trainer.outputs((X,))[0].shape == (16, 5)
    assert found["cpu"][1].keys() == found[device][1].keys()
    if device == "cpu":
        assert found["cpu"][0] == found[device][0]


def test_training_there_is_repeatable(device, native):
    device = adapter("torch").device(device)

    def trained():
        trainer = TorchTrainer(native, native, Distillation(alpha=0.5), 3, 4, device)
        losses = [trainer.step(((X,), Y), 1e-2) for _ in range(4)]
        return losses, trainer.state()

    (losses, state), (again, other) = trained(), trained()
    assert losses == again
    assert all(np.array_equal(state[name], other[name]) for name in state)


def test_a_checkpoint_made_there_goes_on_there_as_if_nothing_had_been(device, native):
    device = adapter("torch").device(device)
    whole = TorchTrainer(native, None, Distillation(alpha=0.0), 3, 4, device)
    whole.step(((X,), Y), 1e-2)
    state = {name: array.copy() for name, array in whole.state().items()}
    rest = TorchTrainer(native, None, Distillation(alpha=0.0), 5, 4, device)
    rest.restore(state)
    assert [whole.step(((X,), Y), 1e-2) for _ in range(3)] == [rest.step(((X,), Y), 1e-2) for _ in range(3)]


def test_training_there_leaves_the_processes_random_numbers_alone(device, native):
    device = adapter("torch").device(device)
    before = devices.generator_states()
    TorchTrainer(native, None, Distillation(alpha=0.0), 3, 4, device).step(((X,), Y), 1e-2)
    after = devices.generator_states()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_there_are_the_cpus(device, native):
    device = adapter("torch").device(device)
    for loss, labels in (("cross_entropy", Y), ("norm", None)):
        wanted = gradients(native, [((X,), labels)], loss)
        found = gradients(native, [((X,), labels)], loss, device=device)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name] == pytest.approx(array, rel=1e-3, abs=1e-5 * max(1.0, float(np.abs(array).max())))


def test_answers_there_are_the_cpus(device, native):
    with using(device):
        ((found,),) = adapter("torch").answers(native, [(X,)])
    (wanted,) = adapter("torch").outputs(native, (X,))
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    ((laid_out,),) = train.answers(native, [(X,)], "cpu")
    assert laid_out == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_gram_matrices_there_are_the_cpus(device):
    torch.manual_seed(0)
    model = sl.load(Net().eval(), X[:2])
    found = {}
    for name in ("cpu", device):
        with using(name):
            found[name] = collect(model, matrices(model.graph), [(X,)])
    assert found["cpu"].keys() == found[device].keys()
    for node, gram in found["cpu"].items():
        assert found[device][node].second == pytest.approx(gram.second, rel=1e-4, abs=1e-5)


# On a pretended GPU.


class Apart(TorchDispatchMode):
    """Refuses operators that mix the CPU's tensors with those of another device, as a GPU does, and counts the rest."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in tensors if x.dim()}
        assert copies or len(places) < 2, f"{func} reads tensors of {places}"
        result = func(*args, **(kwargs or {}))
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        self.seen += made == {"meta"}
        return result


@pytest.fixture
def pretended(monkeypatch):
    """``meta`` as a GPU: what is read back from it is zero, and it draws and computes as the CPU does."""
    cpu = torch.Tensor.cpu

    def read(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", read)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: float(read(tensor).numpy()))
    monkeypatch.setattr(train, "seeded", lambda device, seed: devices.seeded("cpu", seed))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))

    def optimizer(self):
        return torch.optim.SGD([{"params": list(self._trained.values()), "factor": 1.0}], 1.0, momentum=0.9)

    monkeypatch.setattr(train.TorchTrainer, "_make_optimizer", optimizer)
    return "meta"


def test_a_trainer_leaves_nothing_behind_on_the_cpu(pretended, native):
    step = Distillation(alpha=0.5)
    values = [node.name for node in native.graph.nodes if "relu" in str(node.target)]
    with Apart() as apart:
        trainer = TorchTrainer(native, native, step, 0, 2, pretended)
        trainer.add(Term.mean(values, l1, 0.1))
        trainer.hold({"head.weight": np.ones((5, 8), bool)})
        trainer.refresh([((X,), None)])
        trainer.step(((X,), Y), 1e-2)
        trainer.hold({"head.weight": np.ones((5, 8), bool)})
        trainer.set_weights(trainer.weights())
        trainer.gradients(((X,), Y))
        trainer.slopes()
        assert trainer.outputs((X,))[0].shape == train.answers(native, [(X,)], pretended)[0][0].shape == (16, 5)
        state = trainer.state()
        trainer.restore(state)
        trainer.step(((X,), Y), 1e-2)
    assert apart.seen > 100
    assert all(t.device.type == "meta" for t in trainer._student.module.state_dict().values())
    assert all(t.device.type == "cpu" for t in native.state_dict().values())


def test_regression_labels_and_gradients_too(pretended, native):
    with Apart() as apart:
        trainer = TorchTrainer(native, None, Distillation(alpha=0.0, loss="mse"), 0, 2, pretended)
        trainer.step(((X,), np.zeros((16, 5), np.float32)), 1e-2)
        for loss, labels in (("cross_entropy", Y), ("norm", None)):
            found = gradients(native, [((X,), labels)], loss, device=pretended)
            assert found["conv.weight"].shape == (8, 1, 3, 3)
    assert apart.seen > 50


def test_calibration_sends_only_what_it_reads(pretended, native, monkeypatch):
    names = [node.name for node in native.graph.nodes if node.op == "call_function"]
    seen: list[str] = []
    sent: list[tuple[int, ...]] = []
    move = devices.move

    def moved(tensor, device):
        sent.append(tuple(tensor.shape))
        return move(tensor, device)

    monkeypatch.setattr(observing, "move", moved)
    with Apart() as apart:
        observe(native, [(X,), (X,)], names, lambda name, array: seen.append(name), device=pretended)
        assert set(seen) <= set(names) and len(seen) > 20
        first = next(node.name for node in native.graph.nodes if "conv2d" in str(node.target))
        sent.clear()
        observe(native, [(X,), (X,)], [first], lambda name, array: None, device=pretended)
    assert apart.seen > 20
    assert sorted(sent) == sorted([X.shape, X.shape, (8, 1, 3, 3), (8,)])
    assert all(t.device.type == "cpu" for t in native.state_dict().values())


def test_a_masked_model_is_placed_too(pretended):
    torch.manual_seed(0)
    model = sl.load(nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), X[:2])
    masked = sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion="l2")).mask(model)
    with Apart() as apart:
        gradients(masked.native, [((X,), None)], "norm", device=pretended)
    assert apart.seen > 10


# What a GPU does otherwise.


def test_on_a_gpu_numbers_are_repeatable_and_float32_is_no_less(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), flags.deterministic, flags.benchmark, flags.allow_tf32
    with devices.computing("cuda:0"):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert (flags.deterministic, flags.benchmark, flags.allow_tf32) == (True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    now = torch.are_deterministic_algorithms_enabled(), flags.deterministic, flags.benchmark, flags.allow_tf32
    assert now == before
    with devices.computing("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "The memory of cuda:0 is full: use a smaller",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "The memory of cuda:0 is full"),
        (
            NotImplementedError("The operator 'aten::x' is not there.\nMore"),
            "does not compute this model .The operator",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_a_sentence(error, said):
    with pytest.raises(SlimlineError, match=said), devices.computing("cuda:0"):
        raise error
    with pytest.raises(type(error)), devices.computing("cpu"):
        raise error
    with pytest.raises(RuntimeError, match="mat1"), devices.computing("cuda:0"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(SlimlineError, match="cuda:0 does not compute in bfloat16: choose precision float32"):
        TorchTrainer(native, None, Distillation(precision="bfloat16"), 0, 1, "cuda:0")


def test_float64_is_refused_where_mps_has_none():
    module = torch.fx.symbolic_trace(nn.Linear(2, 2).double())
    with pytest.raises(SlimlineError, match="weight is stored in float64, which MPS does not have: choose device cpu"):
        devices.place(module, "mps")


@pytest.mark.parametrize(("name", "calls"), [("cuda:1", torch.cuda), ("mps", torch.mps)])
def test_random_numbers_are_drawn_from_the_devices_generator(monkeypatch, name, calls):
    held = {"state": torch.tensor([1, 1], dtype=torch.uint8)}
    asked = []

    def get(*device):
        asked.append(device)
        return held["state"].clone()

    def put(state, *device):
        asked.append(device)
        held["state"] = state.clone()

    monkeypatch.setattr(calls, "get_rng_state", get)
    monkeypatch.setattr(calls, "set_rng_state", put)
    own = torch.tensor([2, 2], dtype=torch.uint8)
    cpu = torch.get_rng_state()
    with devices.drawing(name, own):
        assert held["state"].tolist() == [2, 2]
        held["state"] += 1
    assert (held["state"].tolist(), own.tolist()) == ([1, 1], [3, 3])
    assert set(asked) == ({("cuda:1",)} if name == "cuda:1" else {()})
    assert torch.equal(cpu, torch.get_rng_state())


def test_a_checkpoint_of_another_device_goes_on(native):
    state = TorchTrainer(native, None, Distillation(alpha=0.0), 3, 4).state()
    foreign = {**state, "random/cuda": np.arange(16, dtype=np.uint8)}
    del foreign["random"]
    losses = []
    for _ in range(2):
        trainer = TorchTrainer(native, None, Distillation(alpha=0.0), 3, 4)
        trainer.restore(foreign)
        losses.append([trainer.step(((X,), Y), 1e-2) for _ in range(2)])
    assert losses[0] == losses[1]
    assert "random" in trainer.state() and "random/cuda" not in trainer.state()


def test_the_random_state_of_a_checkpoint_is_named_by_its_kind_of_device(monkeypatch):
    monkeypatch.setattr(devices, "seeded", lambda device, seed: torch.tensor([seed % 251], dtype=torch.uint8))
    cuda = np.arange(16, dtype=np.uint8)
    assert [devices.random_name(d) for d in ("cpu", "cuda:1", "mps")] == ["random", "random/cuda", "random/mps"]
    assert devices.random_of({"random/cuda": cuda}, "cuda:3").numpy() == pytest.approx(cuda)
    one, same, other = (
        devices.random_of({name: array}, "mps")
        for name, array in (("random", cuda), ("random/cuda", cuda), ("random", cuda + 1))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


# Models that come from a GPU.


def test_a_model_on_a_gpu_is_copied_and_one_on_the_cpu_is_not(monkeypatch):
    module = nn.Linear(2, 3)
    program = torch.export.export(module, (torch.zeros(2, 2),))
    assert devices.to_cpu(module) is module and devices.to_cpu(program) is program
    monkeypatch.setattr(devices, "_near", lambda tensors: False)
    copied = devices.to_cpu(module)
    assert copied is not module and torch.equal(copied.weight, module.weight)
    with pytest.raises(SlimlineError, match="exported on a GPU: export it on the cpu, or give the module itself"):
        devices.to_cpu(program)


def test_the_names_of_devices_in_a_graph_follow():
    program = torch.export.export(Net().eval(), (torch.zeros(2, 1, 8, 8),))
    graph = program.module().graph
    made = [n for n in graph.nodes if isinstance(n.kwargs.get("device"), torch.device)]
    assert made
    with graph.inserting_before(made[0]):
        bare = graph.call_function(torch.ops.aten.arange.default, (3,))
    devices.place_graph(graph, "cuda:1")
    assert {n.kwargs["device"] for n in (*made, bare)} == {torch.device("cuda:1")}
