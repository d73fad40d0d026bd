"""Which objects the config of a ``.keras`` file may ask Keras to make.

Keras finds a class or a function by the module and name that the file gives, and there is much in Keras that does more
than compute: it fetches files, loads other models, unpickles. So a config is walked first, and every object in it must
be on the list here, or registered in this process by its user.
"""

from __future__ import annotations

import importlib
from typing import Any

import keras

from slimline.files.strictjson import Malformed

_SIZES = ("1D", "2D", "3D")
LAYERS = frozenset(
    (
        *("Activation", "ELU", "LeakyReLU", "PReLU", "ReLU", "Softmax", "ThresholdedReLU"),
        *("AdditiveAttention", "Attention", "GroupQueryAttention", "MultiHeadAttention"),
        *("Dense", "EinsumDense", "Embedding", "Identity", "InputLayer", "Masking", "ReversibleEmbedding"),
        *("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract"),
        *("BatchNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization"),
        *("UnitNormalization", "SpectralNormalization", "Normalization", "Rescaling", "Resizing", "CenterCrop"),
        *("ActivityRegularization", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise"),
        *("Flatten", "Permute", "RepeatVector", "Reshape"),
        *("Bidirectional", "GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "SimpleRNN", "SimpleRNNCell"),
        *("StackedRNNCells", "TimeDistributed"),
        *("RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation", "RandomContrast", "RandomBrightness"),
        *("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
        *(
            f"{kind}{size}"
            for size in _SIZES
            for kind in ("Conv", "Cropping", "UpSampling", "ZeroPadding", "SpatialDropout", "ConvLSTM")
        ),
        *(f"Conv{size}Transpose" for size in _SIZES),
        *(
            f"{prefix}{kind}{size}"
            for size in _SIZES
            for prefix in ("", "Global", "Adaptive")
            for kind in ("AveragePooling", "MaxPooling")
        ),
    )
)
_MODELS = ("Functional", "Sequential", "Model")
_INITIALIZERS = frozenset(
    (
        *("Constant", "Zeros", "Ones", "Identity", "IdentityInitializer", "Orthogonal", "OrthogonalInitializer"),
        *("RandomNormal", "RandomUniform", "TruncatedNormal", "VarianceScaling", "GlorotNormal", "GlorotUniform"),
        *("HeNormal", "HeUniform", "LecunNormal", "LecunUniform"),
    )
)
_CLASSES: dict[str, frozenset[str]] = {
    "keras": frozenset((*_MODELS, "DTypePolicy")),
    "keras.models": frozenset(_MODELS),
    "keras.src.models.functional": frozenset(("Functional",)),
    "keras.src.models.sequential": frozenset(("Sequential",)),
    "keras.src.models.model": frozenset(("Model",)),
    "keras.layers": LAYERS,
    "keras.src.applications.convnext": frozenset(("LayerScale", "StochasticDepth")),
    "keras.initializers": _INITIALIZERS,
    "keras.regularizers": frozenset(("L1", "L2", "L1L2", "OrthogonalRegularizer")),
    "keras.constraints": frozenset(("MaxNorm", "NonNeg", "UnitNorm", "MinMaxNorm")),
    "keras.dtype_policies": frozenset(("DTypePolicy", "FloatDTypePolicy", "DTypePolicyMap")),
    "keras.src.ops.core": frozenset(
        ("Cast", "ConvertToTensor", "Scatter", "ScatterUpdate", "Slice", "SliceUpdate", "StopGradient", "Unstack")
    ),
}
# Modules of functions on tensors, all of whose operations may be used.
_OPERATIONS = tuple(f"keras.src.ops.{name}" for name in ("numpy", "nn", "math", "linalg", "image"))
ACTIVATIONS = frozenset(
    (
        *("celu", "elu", "exponential", "gelu", "glu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_swish"),
        *("hard_tanh", "leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6", "selu"),
        *("sigmoid", "silu", "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus", "sparse_sigmoid"),
        *("sparsemax", "squareplus", "swish", "tanh", "tanh_shrink", "threshold"),
    )
)
_VALUES = ("__keras_tensor__", "__numpy__", "__tensor__", "__slice__", "__ellipsis__", "__bytes__")
DTYPES = frozenset(
    ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
)
UNROLLED = 4096
OWN_LAYER = "a layer of your own"


def checked(config: Any) -> Any:
    """A copy of a model's config without what it says of training.

    Raises
    ------
    Malformed : an object that is neither listed here nor registered by the user; code; or a number of unrolled steps
        that would take for ever.
    """
    if not isinstance(config, dict) or not isinstance(config.get("class_name"), str):
        raise Malformed("holds a config that describes no model")
    walk = _Walk()
    copy = walk.value(config)
    if walk.unrolls and walk.longest > UNROLLED:
        raise Malformed(f"unrolls a recurrent layer over inputs of {walk.longest:,}")
    return copy


class _Walk:
    def __init__(self) -> None:
        self.unrolls, self.longest = False, 0

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "class_name" in value:
            _check_object(value)
            value = {key: part for key, part in value.items() if key != "compile_config"}
        self.unrolls |= value.get("unroll") not in (None, False)
        shape = value.get("batch_shape", value.get("batch_input_shape"))
        if isinstance(shape, list):
            self.longest = max([self.longest, *(n for n in shape if isinstance(n, int))])
        return {key: self.value(part) for key, part in value.items()}


def _check_object(value: dict[str, Any]) -> None:
    name, module, registered = value["class_name"], value.get("module"), value.get("registered_name")
    if not all(isinstance(part, (str, type(None))) for part in (name, module, registered)) or name is None:
        raise Malformed("names an object by something that is no name")
    config = value.get("config")
    if name in _VALUES:
        _check_plain(name, config)
    elif name == "function":
        if not isinstance(config, str) or not (_is_registered(config) or _is_activation(module, config)):
            raise Malformed(f"uses the function {str(module)[:60]}.{str(config)[:60]}, which is no activation of Keras")
    elif name in ("__lambda__", "Lambda"):
        raise Malformed("carries Python code in a Lambda layer, which is not run")
    elif not (_is_registered(registered) or _is_listed(module, name)):
        own = module is None or module.partition(".")[0] != "keras"
        where = "" if module is None else f"{module[:60]}."
        raise Malformed(f"uses {OWN_LAYER if own else 'the object'} {where}{name[:60]}")


def _check_plain(name: str, config: Any) -> None:
    if name in ("__numpy__", "__tensor__", "__keras_tensor__"):
        dtype = config.get("dtype") if isinstance(config, dict) else None
        known = dtype is None or isinstance(dtype, dict) or (isinstance(dtype, str) and dtype in DTYPES)
        if not known:
            raise Malformed(f"holds numbers of type {str(dtype)[:60]!r}")


def _is_registered(name: str | None) -> bool:
    return name is not None and name in keras.saving.get_custom_objects()


def _is_activation(module: str | None, name: str) -> bool:
    return module in ("builtins", "keras.activations") and name in ACTIVATIONS


def _is_listed(module: str | None, name: str) -> bool:
    if module is None:
        return False
    if name in _CLASSES.get(module, ()):
        return True
    if module not in _OPERATIONS:
        return False
    member = vars(importlib.import_module(module)).get(name)
    return isinstance(member, type) and issubclass(member, keras.Operation) and member.__module__ == module
