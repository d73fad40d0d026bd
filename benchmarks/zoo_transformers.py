"""Hugging Face transformers, built from small configs with random weights: is each pruned exactly?

    python benchmarks/zoo_transformers.py [NAME …]

Needs an environment with transformers beside slimline; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo import Case, main

TEXT = {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**TEXT, "intermediate_size": 96, "max_position_embeddings": 40}
DECODER = {**ENCODER, "num_key_value_heads": 2, "use_cache": False}
IMAGE = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def named(model: Any, names: tuple[str, ...], outputs: int | None) -> Any:
    """The model with inputs `names` by position and its first `outputs` only: hidden states that it also gives away
    could not be pruned."""
    from torch import nn

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return self.model(**dict(zip(names, inputs, strict=True)), return_dict=False)[:outputs]

    return Named()


def _inputs(name: str) -> Any:
    import torch

    made = {
        "input_ids": lambda: torch.randint(5, 100, (2, 11)),
        "decoder_input_ids": lambda: torch.randint(5, 100, (2, 7)),
        "attention_mask": lambda: torch.ones(2, 11, dtype=torch.long).index_fill(1, torch.tensor([9, 10]), 0),
        "pixel_values": lambda: torch.randn(2, 3, 32, 32),
        "input_values": lambda: torch.randn(2, 800),
        "input_features": lambda: torch.randn(2, 16, 60),
    }
    return made[name]()


def case(model: str, config: str, settings: dict[str, Any], *inputs: str, outputs: int | None = 1) -> Case:
    """A class of transformers, its config's class and settings, the names of its inputs and how many outputs count."""

    def make() -> tuple[Any, tuple[Any, ...]]:
        import transformers

        module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return named(module, inputs, outputs), tuple(_inputs(name) for name in inputs)

    return Case(make)


def cases() -> dict[str, Case]:
    """Every model of the sweep."""
    masked = ("input_ids", "attention_mask")
    both = ("input_ids", "decoder_input_ids")
    small: Callable[..., dict[str, Any]] = dict
    swin = small(image_size=32, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4)
    t5 = small(vocab_size=120, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, use_cache=False)
    bart = small(
        vocab_size=120, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=40, use_cache=False,
    )  # fmt: skip
    whisper = {**bart, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 20, "pad_token_id": 0,
               "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    speech = small(
        vocab_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        conv_dim=[24, 24, 32], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 2], num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.0, mask_feature_prob=0.0,
    )  # fmt: skip
    clip = small(
        text_config={**ENCODER, "projection_dim": 32}, vision_config={**IMAGE, "projection_dim": 32}, projection_dim=32
    )
    return {
        "bert": case("BertForSequenceClassification", "BertConfig", ENCODER, *masked),
        "bert-mlm": case("BertForMaskedLM", "BertConfig", ENCODER, *masked),
        "roberta": case("RobertaForSequenceClassification", "RobertaConfig", ENCODER, *masked),
        "distilbert": case(
            "DistilBertForSequenceClassification", "DistilBertConfig",
            small(vocab_size=120, dim=48, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=40), *masked,
        ),
        "albert": case("AlbertForSequenceClassification", "AlbertConfig", {**ENCODER, "embedding_size": 32}, *masked),
        "electra": case(
            "ElectraForSequenceClassification", "ElectraConfig", {**ENCODER, "embedding_size": 32}, *masked
        ),
        "deberta": case(
            "DebertaForSequenceClassification", "DebertaConfig",
            {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
            *masked,
        ),
        "deberta-v2": case(
            "DebertaV2ForSequenceClassification", "DebertaV2Config",
            {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
             "norm_rel_ebd": "layer_norm", "share_att_key": True},
            *masked,
        ),
        "vit": case("ViTForImageClassification", "ViTConfig", IMAGE, "pixel_values"),
        "deit": case("DeiTForImageClassification", "DeiTConfig", IMAGE, "pixel_values"),
        "swin": case("SwinForImageClassification", "SwinConfig", swin, "pixel_values"),
        "convnext": case(
            "ConvNextForImageClassification", "ConvNextConfig",
            small(hidden_sizes=[16, 24, 32], depths=[1, 2, 1], num_stages=3, image_size=32), "pixel_values",
        ),
        "gpt2": case(
            "GPT2LMHeadModel", "GPT2Config",
            small(vocab_size=120, n_embd=48, n_layer=2, n_head=4, n_positions=40, use_cache=False), *masked,
        ),
        "llama": case("LlamaForCausalLM", "LlamaConfig", DECODER, *masked),
        "qwen2": case("Qwen2ForCausalLM", "Qwen2Config", DECODER, *masked),
        "qwen3": case("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 12}, *masked),
        "mistral": case("MistralForCausalLM", "MistralConfig", DECODER, *masked),
        "t5": case("T5ForConditionalGeneration", "T5Config", t5, *both),
        "t5-encoder": case("T5EncoderModel", "T5Config", t5, *masked),
        "t5-gated": case(
            "T5ForConditionalGeneration", "T5Config",
            {**t5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, *both,
        ),
        "bart": case("BartForConditionalGeneration", "BartConfig", bart, *both),
        "whisper": case(
            "WhisperForConditionalGeneration", "WhisperConfig", whisper, "input_features", "decoder_input_ids"
        ),
        "wav2vec2": case("Wav2Vec2ForCTC", "Wav2Vec2Config", speech, "input_values"),
        "wav2vec2-layer-norm": case(
            "Wav2Vec2ForCTC", "Wav2Vec2Config", {**speech, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
            "input_values",
        ),
        "hubert": case("HubertForCTC", "HubertConfig", speech, "input_values"),
        "clip": case("CLIPModel", "CLIPConfig", clip, "input_ids", "pixel_values", "attention_mask", outputs=4),
        "clip-vision": case(
            "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**IMAGE, "projection_dim": 32}, "pixel_values"
        ),
        "dinov2": case("Dinov2ForImageClassification", "Dinov2Config", IMAGE, "pixel_values"),
        "beit": case("BeitForImageClassification", "BeitConfig", IMAGE, "pixel_values"),
        "segformer": case(
            "SegformerForImageClassification", "SegformerConfig",
            small(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
                  decoder_hidden_size=32), "pixel_values",
        ),
    }  # fmt: skip


if __name__ == "__main__":
    main("transformers", cases(), {}, __doc__)
