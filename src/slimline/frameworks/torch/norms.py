"""Batch norms of a network that is only asked become a part of the convolutions before them."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from slimline.frameworks.torch.native import tensors
from slimline.frameworks.torch.operators import add_constant, argument, packet

_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")


def fold_norms(module: fx.GraphModule) -> None:
    """Fold, in place, every batch norm that normalises what nothing but it reads of a convolution.

    Its answers are those in inference mode but for rounding, its stored tensors others: it can be asked, not trained.
    """
    stored = tensors(module)
    for norm in module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
        convolution = norm.args[0]
        if packet(convolution) not in _CONVOLUTIONS or len(convolution.users) > 1:
            continue
        operands = [argument(convolution, name) for name in ("weight", "bias")]
        operands += [argument(norm, name) for name in ("running_mean", "running_var", "weight", "bias")]
        held = [stored.get(str(each.target)) if isinstance(each, fx.Node) else None for each in operands]
        if any(tensor is None and each is not None for tensor, each in zip(held, operands, strict=True)):
            continue  # one of them is computed
        kernel, bias, mean, variance, scale, shift = held
        if kernel is None or mean is None or variance is None:
            continue
        parts = fuse_conv_bn_weights(kernel, bias, mean, variance, argument(norm, "eps"), scale, shift)
        with module.graph.inserting_before(convolution):
            folded = [
                module.graph.get_attr(add_constant(module, f"{norm.name}_{index}", part.detach()))
                for index, part in enumerate(parts)
            ]
        convolution.args = (convolution.args[0], *folded, *convolution.args[3:])
        convolution.kwargs = {k: v for k, v in convolution.kwargs.items() if k not in ("weight", "bias")}
        norm.replace_all_uses_with(convolution)
        module.graph.erase_node(norm)
    module.graph.eliminate_dead_code()
    module.recompile()
