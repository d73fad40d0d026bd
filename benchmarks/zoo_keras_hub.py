"""Backbones of KerasHub from small configs with random weights, a classifier behind each, pruned at 30 %.

    PYTHONPATH=src:/work/venvs/hub python benchmarks/zoo_keras_hub.py [--resume] [MODEL ...]

KerasHub is installed beside the environment, `pip install --no-deps --target DIR keras-hub kagglehub kagglesdk==0.1.28
regex tokenizers sentencepiece`: its tokenizers would want tensorflow-text, its backbones do not.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zoo
from zoo import TOLERANCE, Case, pruned

TEXT = {"vocabulary_size": 30, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64}
ENCODER = {**TEXT, "num_heads": 4, "max_sequence_length": 8}
DECODER = {**TEXT, "num_query_heads": 4, "num_key_value_heads": 2}
SQUARE = {"image_shape": (32, 32, 3)}
VISION = {**SQUARE, "patch_size": 8, "num_layers": 2, "hidden_dim": 32, "num_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "XLMRoberta": ENCODER,
    "DistilBert": ENCODER,
    "Albert": {**ENCODER, "embedding_dim": 16},
    "DebertaV3": ENCODER,
    "Electra": {**{k: v for k, v in ENCODER.items() if k != "vocabulary_size"}, "vocab_size": 30, "embedding_dim": 16},
    "FNet": {k: v for k, v in ENCODER.items() if k != "num_heads"},
    "RoformerV2": {**TEXT, "num_heads": 4, "head_size": 8},
    "XLNet": {**TEXT, "num_heads": 4},
    "ESM": {k: v for k, v in ENCODER.items() if k != "max_sequence_length"},
    "GPT2": ENCODER,
    "GPTNeoX": ENCODER,
    "OPT": ENCODER,
    "Bloom": {**TEXT, "num_heads": 4},
    "Falcon": {**TEXT, "num_attention_heads": 4},
    "Llama": DECODER,
    "Llama3": DECODER,
    "Mistral": {**DECODER, "sliding_window": 4},
    "Mixtral": {**DECODER, "num_experts": 2, "top_k": 1},
    "Gemma": {**DECODER, "head_dim": 8},
    "Gemma3": {**DECODER, "head_dim": 8, "image_size": 16, "vision_encoder": None},
    "Phi3": DECODER,
    "Qwen": DECODER,
    "Qwen3": {**DECODER, "head_dim": 8},
    "T5": {**TEXT, "num_heads": 4},
    "Bart": ENCODER,
    "Whisper": {**TEXT, "num_heads": 4, "max_encoder_sequence_length": 8, "max_decoder_sequence_length": 8},
    "ViT": {**VISION, "patch_size": (8, 8), "mlp_dim": 64},
    "DeiT": {**VISION, "intermediate_dim": 64},
    "MiT": {**SQUARE, "layerwise_depths": [2, 2], "hidden_dims": [16, 32], "num_layers": 2,
            "layerwise_num_heads": [1, 2], "layerwise_sr_ratios": [4, 2], "max_drop_path_rate": 0.1,
            "layerwise_patch_sizes": [7, 3],
            "layerwise_strides": [4, 2]},
    "SwinTransformer": {**SQUARE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                        "window_size": 4},
    "ResNet": {**SQUARE, "input_conv_filters": [16], "input_conv_kernel_sizes": [7], "stackwise_num_filters": [64, 32],
               "stackwise_num_blocks": [2, 2], "stackwise_num_strides": [1, 2], "block_type": "bottleneck_block"},
    "DenseNet": {**SQUARE, "stackwise_num_repeats": [2, 3], "compression_ratio": 0.5, "growth_rate": 8},
    "VGG": {**SQUARE, "stackwise_num_repeats": [1, 2], "stackwise_num_filters": [16, 32]},
    "EfficientNet": {"stackwise_kernel_sizes": [3, 3], "stackwise_num_repeats": [1, 2],
                     "stackwise_input_filters": [16, 16], "stackwise_output_filters": [16, 24],
                     "stackwise_expansion_ratios": [1, 4], "stackwise_squeeze_and_excite_ratios": [0.25, 0.25],
                     "stackwise_strides": [1, 2], "stackwise_block_types": ["fused", "unfused"],
                     "stackwise_force_input_filters": [0, 0], "stackwise_nores_option": [False] * 2,
                     "width_coefficient": 1.0, "depth_coefficient": 1.0, **SQUARE},
    "Xception": {**SQUARE, "stackwise_conv_filters": [[16, 16], [24, 24], [32, 32]],
                 "stackwise_pooling": [False, True, False]},
}  # fmt: skip
SKIPPED = {
    "backbones of several towers (CLIP, SAM, PaliGemma, Stable Diffusion 3 …)": "they are made of those in the table",
}


def build(name: str) -> tuple[Any, tuple[np.ndarray, ...]]:
    """The backbone under a classifier, seeded, norms unsettled, and a batch of two."""
    import slimline.frameworks.keras  # noqa: F401  # isort: skip
    import keras
    import keras_hub

    if name == "MiT":  # whose own layer KerasHub does not register, without which Keras loads no file of it either
        from keras_hub.src.models.mit.mit_layers import DropPath

        keras.saving.register_keras_serializable("keras_hub")(DropPath)
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**CONFIGS[name])
    rng = np.random.default_rng(0)
    features = keras.tree.flatten(backbone.output)[-1] if not isinstance(backbone.output, dict) else None
    if features is None:
        keys = [key for key in ("decoder_sequence_output", "sequence_output") if key in backbone.output]
        features = backbone.output[keys[0]] if keys else next(iter(backbone.output.values()))
    axes = tuple(range(1, len(features.shape) - 1))
    outputs = keras.layers.Dense(5, name="classifier")(keras.ops.mean(features, axes) if axes else features)
    model = keras.Model(backbone.inputs, outputs)
    for variable in model.variables:
        kind, shape = variable.path.rpartition("/")[2], tuple(variable.shape)
        if kind in ("gamma", "moving_variance") or "scale" in kind:
            variable.assign(rng.uniform(0.7, 1.4, shape))
        elif kind in ("beta", "moving_mean", "bias"):
            variable.assign(rng.normal(0, 0.1, shape))
    return model, tuple(_input(t, rng) for t in model.inputs)


def _input(tensor: Any, rng: np.random.Generator) -> np.ndarray:
    """Tokens, a mask with some padding, segments, or normal numbers."""
    shape = tuple(n or (2 if d == 0 else 8) for d, n in enumerate(tensor.shape))
    if "mask" in tensor.name:
        return (np.arange(shape[1]) < [[shape[1]], [shape[1] - 2]]).astype(tensor.dtype)
    if "int" in tensor.dtype:
        return rng.integers(0, 2 if "segment" in tensor.name else 30, shape).astype(tensor.dtype)
    return rng.normal(size=shape).astype(np.float32)


def check(case: Case) -> dict[str, Any]:
    """Everything that is asked of one model."""
    import slimline as sl

    source, example = case.make()
    row: dict[str, Any] = {"covered": False, "failure": "", "parts": []}
    clock = time.perf_counter()
    try:
        model = sl.load(source, example)
    except sl.SlimlineError as e:
        return {**row, "failure": str(e)}
    row["seconds_to_load"] = round(time.perf_counter() - clock, 1)
    try:
        plan, small, masked, facts = pruned(model)
    except sl.SlimlineError as e:
        return {**row, "failure": str(e)[:300]}
    row |= facts
    rng = np.random.default_rng(1)
    x = tuple(
        a[[0, 1, 0]] + (rng.normal(0, 0.3, (3, *a.shape[1:])).astype(a.dtype) if a.dtype.kind == "f" else 0)
        for a in example
    )
    before, removed, zeroed = (m.predict(*x) for m in (model, small, masked))
    row["error"] = float(np.abs(removed - zeroed).max() / np.abs(zeroed).max())
    row["moved"] = float(np.abs(before - zeroed).max() / np.abs(zeroed).max())
    row["exact"] = row["error"] <= TOLERANCE
    row["counted"] = small.graph.size == plan.parameters
    with tempfile.TemporaryDirectory() as folder:
        again = sl.load(small.save(Path(folder) / "small.keras"))
    row["saved"] = bool(np.allclose(again.predict(*x), small.predict(*x), atol=1e-6))
    row |= zoo.exported(small)
    row["trained"] = _trains(small.native, x)
    return zoo.verdict(row)


def _trains(native: Any, x: tuple[np.ndarray, ...]) -> bool:
    """One step of gradient descent moves the matrices, and leaves nothing that is not a number."""
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    native.compile(optimizer=keras.optimizers.SGD(1e-1), loss=loss)
    matrices = [v for v in native.trainable_variables if len(v.shape) > 1 and not v.path.endswith("bias")]
    before = [np.array(v) for v in matrices]
    native.train_on_batch(list(x) if len(x) > 1 else x[0], np.arange(len(x[0])))
    moved = [not np.array_equal(a, v) for a, v in zip(before, matrices, strict=True)]
    finite = all(np.isfinite(np.array(v)).all() for v in native.trainable_variables)
    return finite and float(np.mean(moved)) > 0.9  # what a backbone makes besides may be read by nobody


def main() -> None:
    cases = {name: Case(lambda name=name: build(name)) for name in CONFIGS}  # type: ignore[misc]
    zoo.main("keras_hub", cases, SKIPPED, __doc__, check)


if __name__ == "__main__":
    main()
