"""What is read off a Gram matrix, against rows of inputs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slimline.methods.gram import Gram, diagonal_loading, output_energy


@given(st.integers(0, 100), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_the_energy_of_outputs_is_their_mean_square(seed: int, groups: int, outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, 20, inputs)).astype(np.float32)
    weight = rng.normal(size=(groups, outputs, inputs))
    gram = Gram(groups, inputs)
    gram.see(rows[:, :8])
    gram.see(rows[:, 8:])
    expected = np.square(rows.astype(float) @ weight.swapaxes(1, 2)).mean(axis=1)
    np.testing.assert_allclose(output_energy(weight, gram.second), expected, rtol=1e-4, atol=1e-6)


def test_the_loading_is_a_part_of_the_mean_of_the_diagonal_and_never_nothing() -> None:
    second = np.stack([np.diag([1.0, 3.0]), np.zeros((2, 2))])
    np.testing.assert_allclose(diagonal_loading(second, 0.1), [0.2, 1e-12])
    np.testing.assert_allclose(diagonal_loading(second[1], 0.1, least=0.0), 0.0)
    np.linalg.inv(second + diagonal_loading(second, 0.1)[:, None, None] * np.eye(2))
