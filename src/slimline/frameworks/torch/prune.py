"""What torch hangs on a weight: the masks of `torch.nn.utils.prune`, and norms that hold state of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array, Masked


def masks(source: Any) -> dict[str, Array]:
    """The masks of a module that torch pruned, by the plain name of the weight."""
    if not isinstance(source, nn.Module):
        return {}
    return {
        f"{path}.{name}".lstrip("."): getattr(module, f"{name}_mask").detach().cpu().numpy() != 0
        for path, module, name in _pruned(source)
    }


def plain(source: nn.Module) -> nn.Module:
    """The module with its masks and its spectral and orthogonal norms baked in, all under the weights' plain names;
    itself if it has none.

    Those norms are a constant factor, or a matrix function, of the whole weight: they have no meaning for its parts.
    """
    pruned = list(_pruned(source))
    if not pruned and not any(True for _ in _normed(source)):
        return source
    # A product of a parameter cannot be copied, and is made anew anyway.
    products = [getattr(module, name) for _, module, name in pruned]
    copied = copy.deepcopy(source, {id(product): product.detach() for product in products})
    for _, module, name in list(_pruned(copied)):
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    for module, name in list(_normed(copied)):
        module.eval()  # no step of power iteration
        if parametrize.is_parametrized(module, name):
            module.parametrizations[name].eval()  # type: ignore[union-attr, index]
            parametrize.remove_parametrizations(module, name)
        else:
            remove_spectral_norm(module, name)
    return copied


def _normed(source: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and parameter name of every weight under a spectral or orthogonal norm."""
    stateful = (parametrizations._SpectralNorm, parametrizations._Orthogonal)
    for module in source.modules():
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                if any(isinstance(p, stateful) for p in chain):
                    yield module, name
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                yield module, hook.name


def to_torch_prune(model: Masked, module: nn.Module | None = None) -> nn.Module:
    """The network as a torch module that carries the model's masks as `torch.nn.utils.prune` does.

    Parameters
    ----------
    module : one of the architecture the model was loaded from, into which weights and masks are written (it is also
        returned); None gives a copy of the model's own graph module.

    Raises
    ------
    SlimlineError : a Keras model, one without masks, or a module with other parameters.
    """
    if not isinstance(model, Masked):
        raise SlimlineError(f"model is a {type(model).__name__}, no slimline model: load it with slimline.load first.")
    if model.framework != "torch":
        raise SlimlineError(f"A {model.framework} model has no torch form: load the network in torch.")
    if not model.masks:
        raise SlimlineError("The model has no masks: apply SparsePruning first, and do not finalize it.")
    if module is None:
        result: nn.Module = copy.deepcopy(model.native)
        result.register_forward_pre_hook(_renew)  # a graph module never calls the modules that hold its weights
    else:
        result = module
        try:
            result.load_state_dict(model.native.state_dict())
        except RuntimeError as reason:
            raise SlimlineError(
                "The module has other parameters than the model: give one of the architecture that was loaded."
            ) from reason
    for name, mask in model.masks.items():
        owner, _, leaf = name.rpartition(".")
        tensor = torch.from_numpy(mask)
        prune.custom_from_mask(result.get_submodule(owner), leaf, tensor)  # type: ignore[no-untyped-call]
    return result


def _renew(module: nn.Module, inputs: Any) -> None:
    """Multiply every weight by its mask again."""
    for _, owner, name in _pruned(module):
        hook = next(h for h in owner._forward_pre_hooks.values() if getattr(h, "_tensor_name", None) == name)
        hook(owner, inputs)


def _pruned(source: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and parameter name of everything that torch pruned."""
    for path, module in source.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                yield path, module, hook._tensor_name
