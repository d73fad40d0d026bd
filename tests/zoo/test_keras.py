"""The Keras residual network is the torch one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.zoo.keras import load_torch_weights, residual_cnn

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from slimline.zoo.torch import ResidualCNN  # noqa: E402


@pytest.mark.parametrize("size", [16, 15])
def test_outputs_equal_torchs(size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin = ResidualCNN((4, 6, 8), blocks=2, in_channels=3).eval()
    with torch.no_grad():
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(0, 0.2)
    save_file(twin.state_dict(), tmp_path / "twin.safetensors")
    model = residual_cnn((4, 6, 8), blocks=2, in_channels=3)
    load_torch_weights(model, tmp_path / "twin.safetensors")
    x = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype("float32")
    with torch.no_grad():
        wanted = twin(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model(x.transpose(0, 2, 3, 1)), wanted, rtol=1e-4, atol=1e-4)
    assert model.count_params() == sum(t.numel() for n, t in twin.state_dict().items() if "tracked" not in n)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(ResidualCNN((4, 6, 8)).state_dict(), tmp_path / "twin.safetensors")
    with pytest.raises(SlimlineError, match="widths"):
        load_torch_weights(residual_cnn((4, 6, 9)), tmp_path / "twin.safetensors")
    with pytest.raises(SlimlineError, match="no weights for layer"):
        load_torch_weights(residual_cnn((4, 6, 8), blocks=3), tmp_path / "twin.safetensors")
    (tmp_path / "text").write_text("no")
    with pytest.raises(SlimlineError, match="no safetensors file"):
        load_torch_weights(residual_cnn((4, 6, 8)), tmp_path / "text")
