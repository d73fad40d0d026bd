"""Adam against PyTorch's."""

from __future__ import annotations

import numpy as np
import torch

from slimline.methods.adam import Adam


def test_the_steps_are_those_of_torch_and_go_on_from_a_state():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=5), torch.zeros(5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        theirs += torch.from_numpy(ours)
    optimizer, adam = torch.optim.Adam([theirs], lr=0.1), Adam((5,))
    for _ in range(6):
        gradient = rng.normal(size=5)
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
        again = Adam((5,))
        again.restore(adam.state())
        adam = again
        ours = ours - adam.step(gradient, 0.1)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9)
