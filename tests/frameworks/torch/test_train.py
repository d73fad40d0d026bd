import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.frameworks.torch.train import TorchTrainer, gradients
from slimline.steps.distillation.step import Distillation
from slimline.zoo.torch import ResidualCNN

X = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)
Y = np.arange(64) % 10


class Net(nn.Module):
    """Batch norms, a view (which wants contiguous memory), dropout; optionally a softmax at the end."""

    def __init__(self, width=4, dropout=0.3, softmax=False):
        super().__init__()
        self.body = ResidualCNN((width, width))
        self.conv = nn.Conv2d(1, width, 3)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width * 36, 10)
        self.softmax = softmax

    def forward(self, x):
        y = self.conv(x)
        y = self.drop(self.body(x)) + self.head(y.view(y.shape[0], -1))
        return y.softmax(1) if self.softmax else y


def load(module):
    return adapter("torch").load(module.eval(), (X[:2],))[0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(n=64):
    return ((X[:n],), Y[:n])


def test_refreshed_statistics_are_torchs_cumulative_ones():
    module = Net(dropout=0.0)
    trainer = TorchTrainer(load(module), None, Distillation(), 0, 1)
    oracle = copy.deepcopy(module).train()
    for layer in oracle.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    for x in (X[:32], X[32:]):
        oracle(torch.tensor(x))
    trainer.refresh([((X[:32],), None), ((X[32:],), None)])
    found = trainer.native().state_dict()
    for name, tensor in oracle.state_dict().items():
        if "running" in name:
            assert found[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-5)


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 0.1), ("sgd", 0.1)])
def test_a_step_is_torchs_own(optimizer, decay):
    module, teacher = Net(dropout=0.0), Net(8, softmax=True)
    step = Distillation(optimizer=optimizer, weight_decay=decay, temperature=2.0, alpha=0.7)
    trainer = TorchTrainer(load(module), load(teacher), step, 0, 1)
    with torch.no_grad():
        wanted = teacher(torch.tensor(X)).log()
    module.train()
    groups = [
        {"params": [p for p in module.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in module.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    sgd = {"momentum": 0.9, "nesterov": True}
    oracle = torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, 1.0, **sgd)
    for rate in (1e-2, 5e-3):
        for group in oracle.param_groups:
            group["lr"] = rate
        given = module(torch.tensor(X))
        soft = nn.functional.kl_div(
            (given / 2).log_softmax(1), (wanted / 2).log_softmax(1), reduction="batchmean", log_target=True
        )
        loss = 0.7 * 4 * soft + 0.3 * nn.functional.cross_entropy(given, torch.tensor(Y))
        oracle.zero_grad()
        loss.backward()
        oracle.step()
        assert trainer.step(batch(), rate) == pytest.approx(loss.item(), rel=1e-4)
    found = trainer.native().state_dict()
    if optimizer == "sgd":  # Adam's first steps are signs, which float error may turn where a gradient is tiny
        for name, tensor in module.state_dict().items():
            assert "num_batches" in name or found[name].numpy() == pytest.approx(tensor.detach().numpy(), abs=1e-4)


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "float32"), ("sgd", "bfloat16")])
def test_steps_continue_exactly_from_a_state(optimizer, precision):
    student, teacher = load(Net()), load(Net(8))
    step = Distillation(optimizer=optimizer, precision=precision)
    outside = torch.get_rng_state()
    trainer = TorchTrainer(student, teacher, step, 3, 10)
    losses = [trainer.step(batch(64 - i), 1e-3) for i in range(6)]
    state = trainer.state()
    predicted = trainer.outputs((X,))[0]
    more = [trainer.step(batch(), 1e-3) for _ in range(2)]
    other = TorchTrainer(student, teacher, step, 99, 10)
    other.restore(state)
    assert (other.outputs((X,))[0] == predicted).all()
    assert [other.step(batch(), 1e-3) for _ in range(2)] == more
    assert more[-1] < losses[0]
    assert {k: v.tobytes() for k, v in other.state().items()} == {k: v.tobytes() for k, v in trainer.state().items()}
    native = trainer.native()
    assert native(torch.tensor(X)).detach().numpy() == pytest.approx(trainer.outputs((X,))[0], abs=1e-5)
    assert all(t.is_contiguous() for t in native.state_dict().values())
    assert torch.equal(torch.get_rng_state(), outside)


def test_dropout_draws_from_the_seed():
    student, teacher = load(Net()), load(Net(8))
    first, again, other = (TorchTrainer(student, teacher, Distillation(), s, 1).step(batch(), 1e-3) for s in (0, 0, 1))
    assert first == again != other


class InPlaceOnView(nn.Module):
    """Writes through a view of a convolution: only right if the view shares memory."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(144, 10)

    def forward(self, x):
        y = self.conv(x)
        y.view(-1, 144).mul_(3.0)
        return self.head(y.flatten(1))


def test_writes_through_views_are_kept():
    module = InPlaceOnView()
    trainer = TorchTrainer(load(module), None, Distillation(), 0, 1)
    assert trainer.outputs((X,))[0] == pytest.approx(module(torch.tensor(X)).detach().numpy(), abs=1e-5)


def test_gradients_are_autograds():
    module = Net(softmax=True)
    native = load(module)
    found = gradients(native, [batch(32), ((X[32:],), Y[32:])], "cross_entropy")
    nn.functional.nll_loss(module(torch.tensor(X)).log(), torch.tensor(Y)).backward()
    assert set(found) == {n for n, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        assert found[name] == pytest.approx(parameter.grad.numpy(), abs=1e-5)
    module.zero_grad()
    (module(torch.tensor(X)).square().sum() / 2 / 64).backward()
    assert gradients(native, [((X,), None)], "norm")["head.weight"] == pytest.approx(
        module.head.weight.grad.numpy(), abs=1e-6
    )
    assert all(p.grad is None for p in native.parameters())
    with pytest.raises(SlimlineError, match="needs labels"):
        gradients(native, [((X,), None)], "cross_entropy")
    with pytest.raises(SlimlineError, match="at least one batch"):
        gradients(native, [], "norm")


@pytest.mark.parametrize("inputs", [3, 4, 8, 12, 16])
def test_gradients_of_a_short_cut_are_those_without_onednn(inputs):
    """1x1 convolutions with a stride, channels last, overflow in oneDNN on processors without AVX-512."""
    torch.manual_seed(inputs)
    module = nn.Sequential(
        nn.Conv2d(1, inputs, 3), nn.Conv2d(inputs, 8, 1, 2, bias=False), nn.Flatten(), nn.Linear(72, 10)
    )
    native = load(module)
    with torch.backends.mkldnn.flags(enabled=False):
        wish = gradients(native, [batch()], "cross_entropy")
    for _ in range(20):
        found = gradients(native, [batch()], "cross_entropy")
    for name, array in wish.items():
        assert found[name] == pytest.approx(array, rel=1e-3, abs=1e-5)


SHORT_CUT = """
import sys
import numpy as np, torch
from torch import nn
from slimline.frameworks.base import adapter
from slimline.frameworks.torch.train import gradients

class Permuted(nn.Module):
    def forward(self, x):
        return x.permute(0, 3, 1, 2)

torch.manual_seed(0)
single = sys.argv[1] == "one channel"
first = [nn.Conv2d(1, 4, 3, padding=1)] if single else [Permuted()]
network = nn.Sequential(*first, nn.Conv2d(4, 8, 1, 2, bias=False), nn.Flatten(), nn.Linear(128, 10)).eval()
x = np.random.default_rng(0).normal(size=(64, 8, 8, 1 if single else 4)).astype(np.float32)
x = x.transpose(0, 3, 1, 2) if single else x  # strides of channels last, and contiguous
y = np.arange(64) % 10
native = adapter("torch").load(network, (x[:2],))[0]
for _ in range(20):
    found = gradients(native, [((x,), y)], "cross_entropy")
with torch.backends.mkldnn.flags(enabled=False):
    wish = gradients(native, [((x,), y)], "cross_entropy")
assert all(np.allclose(found[name], wish[name], rtol=1e-3, atol=1e-5) for name in wish)
print("equal")
"""


@pytest.mark.parametrize("images", ["one channel", "permuted in the network"])
def test_a_short_cut_does_not_write_past_its_gradients(images):
    """Also where strides alone look like channels last; glibc ends the process at the first overflow."""
    found = subprocess.run(
        [sys.executable, "-c", SHORT_CUT, images],
        env={**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "equal\n", found.stderr[-2000:]
