"""Result shapes of aten operators for which torch.export knows none.

torch 2.13 cannot export fake quantization with a dynamic batch, for want of a shape function. Importing this
module registers one; the exported programs need it only when they are exported again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FAKE_QUANTIZE = ("fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask")


def _tensor_and_mask(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # registrations live as long
for _name in _FAKE_QUANTIZE:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        library.impl(_name, _tensor_and_mask, "Meta")  # type: ignore[no-untyped-call]
