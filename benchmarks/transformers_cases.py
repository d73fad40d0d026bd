"""How a model of Hugging Face transformers becomes a case of the sweep: built from a small config, inputs by name."""

from __future__ import annotations

from typing import Any

from zoo import Case

TEXT = {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**TEXT, "intermediate_size": 96, "max_position_embeddings": 40}
DECODER = {**ENCODER, "num_key_value_heads": 2, "use_cache": False}
IMAGE = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
BART = {
    "vocab_size": 120, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 40,
    "use_cache": False,
}  # fmt: skip
SPEECH = {
    "vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "conv_dim": [24, 24, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip
TOKENS = ("input_ids", "attention_mask")
BOTH = ("input_ids", "decoder_input_ids")
PIXELS = {"pixel_values": (3, 32, 32)}
SHAPES: dict[str, tuple[int, ...]] = {
    **PIXELS, "input_values": (800,), "input_features": (16, 60), "input_ids": (11,), "decoder_input_ids": (7,),
    "attention_mask": (11,), "bbox": (11, 4),
}  # fmt: skip
"""Of an input by its name, without the batch; a case may say otherwise."""


def named(model: Any, names: tuple[str, ...], outputs: int | None) -> Any:
    """The model with inputs `names` by position and its first `outputs` only: hidden states that it also gives away
    could not be pruned."""
    from torch import nn

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            results = self.model(**dict(zip(names, inputs, strict=True)), return_dict=False)
            return results[:outputs] if isinstance(results, tuple) else results

    return Named()


def _input(name: str, shape: tuple[int, ...]) -> Any:
    import torch

    size = (2, *shape)
    if name == "bbox":
        corner = torch.randint(0, 500, (2, shape[0], 2))
        return torch.cat([corner, corner + torch.randint(1, 400, corner.shape)], -1)
    if name.endswith("ids"):
        return torch.randint(5, 100, size)
    if name == "attention_mask":
        return torch.ones(size, dtype=torch.long).index_fill(1, torch.arange(shape[0] - 2, shape[0]), 0)
    return torch.randn(size)


def case(
    model: str, config: str, settings: dict[str, Any], *inputs: str, outputs: int | None = 1, **shapes: tuple[int, ...]
) -> Case:
    """A class of transformers, its config's class and settings, the names of its inputs (with `shapes` that differ
    from `SHAPES`) and how many outputs count."""

    def make() -> tuple[Any, tuple[Any, ...]]:
        import transformers

        module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        sizes = {**SHAPES, **shapes}
        return named(module, inputs, outputs), tuple(_input(name, sizes[name]) for name in inputs)

    return Case(make)
