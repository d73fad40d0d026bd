"""Numbers as they are given, turned to numpy arrays, or refused in a sentence.

Nothing here imports a framework: tensors are told by what they can do.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from slimline.basics.errors import SlimlineError, raised

log = logging.getLogger(__name__)

Array = np.ndarray
T = TypeVar("T")


def is_array(value: Any) -> bool:
    """Whether `value` is one array or tensor rather than a collection of them."""
    return hasattr(value, "shape") and (hasattr(value, "dtype") or hasattr(value, "__array__"))


def as_array(value: Any, what: str = "The data", *, exact: bool = False) -> Array:
    """A numpy array of an array, a tensor of any framework, an array on disk or nested lists.

    Parameters
    ----------
    what : what the numbers are, for the error.
    exact : whether floats stay as wide as they are; else they become float32.

    Raises
    ------
    SlimlineError : complex, sparse, masked, ragged or no numbers, tensors without data, and arrays that cannot be read.
    """
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise SlimlineError(
                f"{what} has masked entries: fill them with .filled(number), or leave those samples out."
            )
        value = value.data
    if _sparse(value):
        raise SlimlineError(f"{what} is sparse ({type(value).__name__}): make it dense with .toarray() or .to_dense().")
    if _ragged(value):
        raise SlimlineError(f"{what} is ragged: pad the samples to one shape.")
    try:
        array = _read(value)
    except SlimlineError:
        raise
    except Exception as e:
        if str(getattr(value, "device", "")) == "meta":
            raise SlimlineError(f"{what} is a meta tensor, which has a shape and no numbers: give real data.") from e
        if isinstance(value, list | tuple):
            raise SlimlineError(f"{what} is a list of unequal parts: give an array, or parts of one shape.") from e
        kind = type(value).__name__
        raise SlimlineError(f"{what} ({kind}) {raised(e)} when it was read: give a numpy array.") from e
    if array.dtype.kind == "c":
        raise SlimlineError(f"{what} is complex ({array.dtype}): give real and imaginary parts as real numbers.")
    if array.dtype.kind in "US":
        raise SlimlineError(
            f"Data must be numbers, not {array.dtype}: encode text first, labels with "
            "np.unique(y, return_inverse=True)[1]."
        )
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise SlimlineError(f"Data must be numbers, not {array.dtype}: convert it before it is given to slimline.")
    if not exact and (array.dtype.kind == "f" or array.dtype.name == "bfloat16"):
        with warnings.catch_warnings(), np.errstate(over="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)
            array = array.astype(np.float32, copy=False)
    return array


Example = tuple[Array, ...] | dict[str, Array]
"""Example inputs of a model, each ``(batch, …)``: in its order, or by name."""


def examples(inputs: Any, source: Any = None) -> Example:
    """Example inputs of a model as arrays; floats in the precision of a module's weights, if they are in another one.

    Parameters
    ----------
    inputs : one array or tensor, or a tuple, list or dict of them.
    source : the module the inputs are for; what has no ``parameters()`` takes floats as they are, halves as float32.
    """
    dtype = _precision(source)

    def example(value: Any) -> Array:
        array = as_array(value, "The example input", exact=True)
        return _as_weights(array, dtype) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array

    if isinstance(inputs, dict):
        return {str(name): example(value) for name, value in inputs.items()}
    return tuple(example(value) for value in (inputs if isinstance(inputs, tuple | list) else (inputs,)))


def in_order(inputs: tuple[T, ...] | dict[str, T], names: Sequence[str], what: str) -> tuple[T, ...]:
    """What is of each input, by name, in the order of the model's; what has an order, and a single one, as it is.

    Parameters
    ----------
    names : the model's inputs; where they are more, the last may be left out.
    what : what holds the inputs, for the error.

    Raises
    ------
    SlimlineError : other names.
    """
    if not isinstance(inputs, dict):
        return inputs
    if len(inputs) == 1:
        return tuple(inputs.values())
    taken = list(names)[: len(inputs)]
    if set(taken) != set(inputs):
        raise SlimlineError(
            f"{what} has inputs called {', '.join(inputs)}, and the model takes {', '.join(taken)}: name them so, or "
            "give a tuple in the model's order."
        )
    return tuple(inputs[name] for name in taken)


def _as_weights(array: Array, dtype: str | None) -> Array:
    half = array.dtype.name in ("float16", "bfloat16")
    wide = dtype if dtype in ("float32", "float64") else "float32" if half and dtype is None else None
    if wide is None or array.dtype.name == wide:
        return array
    log.warning("The example input is %s and is cast to the %s of the model.", array.dtype, wide)
    return array.astype(wide)


def _precision(source: Any) -> str | None:
    """The one precision of a module's floating-point parameters, or None."""
    parameters = getattr(source, "parameters", None)
    if not callable(parameters) or isinstance(source, type):
        return None
    try:
        names = {str(p.dtype).rpartition(".")[2] for p in parameters() if "float" in str(p.dtype)}
    except (AttributeError, TypeError, RuntimeError):
        return None
    return names.pop() if len(names) == 1 else None


def finite(array: Array) -> bool:
    """Whether no number is NaN or infinite; looks at 16 MB at a time."""
    if array.dtype.kind != "f":
        return True
    rows = max(1, (1 << 22) // max(1, array[0].size)) if array.ndim else 1
    return all(bool(np.isfinite(array[i : i + rows]).all()) for i in range(0, len(array), rows))


def _read(value: Any) -> Array:
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # may need a gradient, or lie on another device
        value = value.detach().cpu()
        value = value.resolve_conj() if hasattr(value, "resolve_conj") else value
        value = value.resolve_neg() if hasattr(value, "resolve_neg") else value
        if str(value.dtype).rpartition(".")[2].startswith(("bfloat16", "float8")):  # unknown to numpy
            value = value.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error", np.exceptions.VisibleDeprecationWarning)
        return np.asarray(value)


def _sparse(value: Any) -> bool:
    """SciPy's matrices and arrays, PyData's, sparse layouts and classes of the frameworks' own."""
    if type(value).__module__.partition(".")[0] in ("scipy", "sparse") and hasattr(value, "nnz"):
        return True
    if "sparse" in str(getattr(value, "layout", "")):
        return True
    return type(value).__name__ in ("SparseTensor", "SparseTensorValue", "IndexedSlices")


def _ragged(value: Any) -> bool:
    return type(value).__name__ in ("RaggedTensor", "RaggedTensorValue") or bool(getattr(value, "is_nested", False))
