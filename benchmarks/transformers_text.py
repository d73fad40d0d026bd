"""Cases of the transformers sweep that read text: encoders, decoders, state spaces, encoder-decoders."""

from __future__ import annotations

from typing import Any

from transformers_cases import BART, BOTH, DECODER, ENCODER, TEXT, TOKENS, case
from zoo import Case

_GPT: dict[str, Any] = {
    "vocab_size": 120, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 120, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "use_cache": False,
}  # fmt: skip
_DEBERTA: dict[str, Any] = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_EXPERTS: dict[str, Any] = {**DECODER, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}


def encoders() -> dict[str, Case]:
    return {
        "bert": case("BertForSequenceClassification", "BertConfig", ENCODER, *TOKENS),
        "bert-mlm": case("BertForMaskedLM", "BertConfig", ENCODER, *TOKENS),
        "roberta": case("RobertaForSequenceClassification", "RobertaConfig", ENCODER, *TOKENS),
        "distilbert": case(
            "DistilBertForSequenceClassification", "DistilBertConfig",
            {"vocab_size": 120, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
             "max_position_embeddings": 40}, *TOKENS,
        ),
        "albert": case("AlbertForSequenceClassification", "AlbertConfig", {**ENCODER, "embedding_size": 32}, *TOKENS),
        "electra": case(
            "ElectraForSequenceClassification", "ElectraConfig", {**ENCODER, "embedding_size": 32}, *TOKENS
        ),
        "deberta": case(
            "DebertaForSequenceClassification", "DebertaConfig", {**_DEBERTA, "max_relative_positions": 16}, *TOKENS
        ),
        "deberta-v2": case(
            "DebertaV2ForSequenceClassification", "DebertaV2Config",
            {**_DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}, *TOKENS,
        ),
        "xlm-roberta": case("XLMRobertaForSequenceClassification", "XLMRobertaConfig", ENCODER, *TOKENS),
        "camembert": case("CamembertForMaskedLM", "CamembertConfig", ENCODER, *TOKENS),
        "mpnet": case("MPNetForSequenceClassification", "MPNetConfig", ENCODER, *TOKENS),
        "xlnet": case(
            "XLNetForSequenceClassification", "XLNetConfig",
            {"vocab_size": 120, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 96, "use_mems_eval": False},
            *TOKENS,
        ),
        "funnel": case(
            "FunnelForSequenceClassification", "FunnelConfig",
            {"vocab_size": 120, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 96, "block_sizes": [1, 1, 1],
             "num_decoder_layers": 1}, *TOKENS,
        ),
        "longformer": case(
            "LongformerForSequenceClassification", "LongformerConfig", {**ENCODER, "attention_window": [4, 4]}, *TOKENS
        ),
        "bigbird-full": case(
            "BigBirdForSequenceClassification", "BigBirdConfig", {**ENCODER, "attention_type": "original_full"},
            *TOKENS,
        ),
        "bigbird-sparse": case(
            "BigBirdForSequenceClassification", "BigBirdConfig",
            {**ENCODER, "max_position_embeddings": 80, "block_size": 4, "num_random_blocks": 1}, *TOKENS,
            input_ids=(64,), attention_mask=(64,),
        ),
        "convbert": case(
            "ConvBertForSequenceClassification", "ConvBertConfig", {**ENCODER, "embedding_size": 32}, *TOKENS
        ),
        "mobilebert": case(
            "MobileBertForSequenceClassification", "MobileBertConfig",
            {**ENCODER, "embedding_size": 32, "intra_bottleneck_size": 24}, *TOKENS,
        ),
        "squeezebert": case(
            "SqueezeBertForSequenceClassification", "SqueezeBertConfig", {**ENCODER, "embedding_size": 48}, *TOKENS
        ),
        "layoutlm": case("LayoutLMForSequenceClassification", "LayoutLMConfig", ENCODER, "input_ids", "bbox"),
        "lilt": case("LiltForSequenceClassification", "LiltConfig", ENCODER, "input_ids", "bbox"),
        "layoutlmv3": case(
            "LayoutLMv3ForSequenceClassification", "LayoutLMv3Config",
            {**ENCODER, "input_size": 32, "patch_size": 8, "coordinate_size": 8, "shape_size": 8}, "input_ids", "bbox",
            "attention_mask", "pixel_values",
        ),
        "fnet": case("FNetForSequenceClassification", "FNetConfig", ENCODER, "input_ids"),
        "ibert": case("IBertForSequenceClassification", "IBertConfig", ENCODER, *TOKENS),
        "rembert": case("RemBertForSequenceClassification", "RemBertConfig", ENCODER, *TOKENS),
        "roformer": case("RoFormerForSequenceClassification", "RoFormerConfig", ENCODER, *TOKENS),
        "ernie": case("ErnieForSequenceClassification", "ErnieConfig", ENCODER, *TOKENS),
        "esm": case(
            "EsmForSequenceClassification", "EsmConfig",
            {**ENCODER, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"}, *TOKENS,
        ),
        "data2vec-text": case("Data2VecTextForSequenceClassification", "Data2VecTextConfig", ENCODER, *TOKENS),
        "megatron-bert": case("MegatronBertForSequenceClassification", "MegatronBertConfig", ENCODER, *TOKENS),
        "canine": case(
            "CanineForSequenceClassification", "CanineConfig",
            {**ENCODER, "max_position_embeddings": 64, "local_transformer_stride": 8, "num_hash_buckets": 50,
             "downsampling_rate": 4},
            *TOKENS, input_ids=(32,), attention_mask=(32,),
        ),
        "splinter": case("SplinterModel", "SplinterConfig", ENCODER, *TOKENS),
        "luke": case("LukeForSequenceClassification", "LukeConfig", {**ENCODER, "entity_vocab_size": 50}, *TOKENS),
        "tapas": case("TapasForSequenceClassification", "TapasConfig", ENCODER, *TOKENS),
        "markuplm": case("MarkupLMForSequenceClassification", "MarkupLMConfig", ENCODER, *TOKENS),
        "flaubert": case(
            "FlaubertForSequenceClassification", "FlaubertConfig",
            {"vocab_size": 120, "emb_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}, *TOKENS,
        ),
        "xlm": case(
            "XLMForSequenceClassification", "XLMConfig",
            {"vocab_size": 120, "emb_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}, *TOKENS,
        ),
        "modernbert": case(
            "ModernBertForSequenceClassification", "ModernBertConfig",
            {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
            *TOKENS,
        ),
        "reformer": case(
            "ReformerForSequenceClassification", "ReformerConfig",
            {"vocab_size": 120, "hidden_size": 48, "num_attention_heads": 4, "attention_head_size": 12,
             "feed_forward_size": 96, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 32],
             "max_position_embeddings": 16, "attn_layers": ["local", "local"], "is_decoder": False,
             "local_attn_chunk_length": 4},
            *TOKENS, input_ids=(16,), attention_mask=(16,),
        ),
        "yoso": case(
            "YosoForSequenceClassification", "YosoConfig", {**ENCODER, "use_expectation": True}, *TOKENS
        ),
    }  # fmt: skip


def decoders() -> dict[str, Case]:
    return {
        "gpt2": case("GPT2LMHeadModel", "GPT2Config", _GPT, *TOKENS),
        "llama": case("LlamaForCausalLM", "LlamaConfig", DECODER, *TOKENS),
        "qwen2": case("Qwen2ForCausalLM", "Qwen2Config", DECODER, *TOKENS),
        "qwen3": case("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 12}, *TOKENS),
        "mistral": case("MistralForCausalLM", "MistralConfig", DECODER, *TOKENS),
        "opt": case("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 96, "max_position_embeddings": 40,
                    "word_embed_proj_dim": 48, "use_cache": False}, *TOKENS),
        "bloom": case(
            "BloomForCausalLM", "BloomConfig",
            {"vocab_size": 120, "hidden_size": 48, "n_layer": 2, "n_head": 4, "use_cache": False}, *TOKENS,
        ),
        "falcon": case("FalconForCausalLM", "FalconConfig", {**TEXT, "use_cache": False}, *TOKENS),
        "falcon-new": case(
            "FalconForCausalLM", "FalconConfig",
            {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "use_cache": False}, *TOKENS,
        ),
        "gpt-neox": case("GPTNeoXForCausalLM", "GPTNeoXConfig", {**ENCODER, "use_cache": False}, *TOKENS),
        "gpt-neo": case(
            "GPTNeoForCausalLM", "GPTNeoConfig",
            {"vocab_size": 120, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 40,
             "attention_types": [[["global", "local"], 1]], "window_size": 4, "use_cache": False}, *TOKENS,
        ),
        "gptj": case("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}, *TOKENS),
        "codegen": case("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "rotary_dim": 4, "n_ctx": 40}, *TOKENS),
        "gpt-bigcode": case("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT, *TOKENS),
        "openai-gpt": case("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT, *TOKENS),
        "ctrl": case("CTRLLMHeadModel", "CTRLConfig", {**_GPT, "dff": 96}, *TOKENS),
        "mpt": case(
            "MptForCausalLM", "MptConfig",
            {"vocab_size": 120, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 40, "use_cache": False},
            *TOKENS,
        ),
        "biogpt": case("BioGptForCausalLM", "BioGptConfig", {**ENCODER, "use_cache": False}, *TOKENS),
        "xglm": case(
            "XGLMForCausalLM", "XGLMConfig",
            {"vocab_size": 120, "d_model": 48, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96,
             "max_position_embeddings": 40, "use_cache": False}, *TOKENS,
        ),
        "phi": case("PhiForCausalLM", "PhiConfig", {**DECODER, "num_key_value_heads": 4}, *TOKENS),
        "phi3": case("Phi3ForCausalLM", "Phi3Config", {**DECODER, "pad_token_id": 0}, *TOKENS),
        "gemma": case("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 12}, *TOKENS),
        "gemma2": case("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 12, "sliding_window": 4}, *TOKENS),
        "gemma3": case(
            "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 12, "sliding_window": 4}, *TOKENS
        ),
        "stablelm": case("StableLmForCausalLM", "StableLmConfig", {**DECODER, "partial_rotary_factor": 0.5}, *TOKENS),
        "starcoder2": case("Starcoder2ForCausalLM", "Starcoder2Config", DECODER, *TOKENS),
        "cohere": case("CohereForCausalLM", "CohereConfig", DECODER, *TOKENS),
        "olmo2": case("Olmo2ForCausalLM", "Olmo2Config", DECODER, *TOKENS),
        "granite": case("GraniteForCausalLM", "GraniteConfig", DECODER, *TOKENS),
        "glm": case("GlmForCausalLM", "GlmConfig", {**DECODER, "head_dim": 12, "pad_token_id": 0}, *TOKENS),
        "nemotron": case("NemotronForCausalLM", "NemotronConfig", DECODER, *TOKENS),
        "persimmon": case("PersimmonForCausalLM", "PersimmonConfig", {**DECODER, "num_key_value_heads": 4}, *TOKENS),
        "helium": case("HeliumForCausalLM", "HeliumConfig", {**DECODER, "head_dim": 12}, *TOKENS),
        "smollm3": case("SmolLM3ForCausalLM", "SmolLM3Config", {**DECODER, "pad_token_id": 0}, *TOKENS),
        "diffllama": case("DiffLlamaForCausalLM", "DiffLlamaConfig", DECODER, *TOKENS),
        "deepseek-v2": case(
            "DeepseekV2ForCausalLM", "DeepseekV2Config",
            {**DECODER, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8,
             "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2}, *TOKENS,
        ),
        "mixtral": case("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}, *TOKENS),
        "qwen2-moe": case(
            "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 64}, *TOKENS
        ),
        "qwen3-moe": case("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "head_dim": 12}, *TOKENS),
        "olmoe": case("OlmoeForCausalLM", "OlmoeConfig", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2},
                      *TOKENS),
        "gpt-oss": case(
            "GptOssForCausalLM", "GptOssConfig",
            {**DECODER, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2}, *TOKENS,
        ),
        "mamba": case(
            "MambaForCausalLM", "MambaConfig",
            {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
            "input_ids",
        ),
        "mamba2": case(
            "Mamba2ForCausalLM", "Mamba2Config",
            {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8,
             "head_dim": 12, "n_groups": 2, "chunk_size": 4, "use_cache": False}, "input_ids",
        ),
        "falcon-mamba": case(
            "FalconMambaForCausalLM", "FalconMambaConfig",
            {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
            "input_ids",
        ),
        "rwkv": case(
            "RwkvForCausalLM", "RwkvConfig",
            {"vocab_size": 120, "hidden_size": 48, "attention_hidden_size": 48, "num_hidden_layers": 2,
             "context_length": 40, "use_cache": False}, "input_ids",
        ),
        "recurrent-gemma": case(
            "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
            {**DECODER, "num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 8,
             "w_init_variance_scale": 0.01}, "input_ids",
        ),
        "lfm2": case("Lfm2ForCausalLM", "Lfm2Config", {**DECODER, "layer_types": ["conv", "full_attention"],
                     "block_multiple_of": 16}, *TOKENS),
    }  # fmt: skip


def sequences() -> dict[str, Case]:
    return {
        "t5": case("T5ForConditionalGeneration", "T5Config", _T5, *BOTH),
        "t5-encoder": case("T5EncoderModel", "T5Config", _T5, *TOKENS),
        "t5-gated": case(
            "T5ForConditionalGeneration", "T5Config",
            {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, *BOTH,
        ),
        "bart": case("BartForConditionalGeneration", "BartConfig", BART, *BOTH),
        "pegasus": case("PegasusForConditionalGeneration", "PegasusConfig", BART, *BOTH),
        "mbart": case("MBartForConditionalGeneration", "MBartConfig", BART, *BOTH),
        "marian": case("MarianMTModel", "MarianConfig", {**BART, "pad_token_id": 0, "decoder_start_token_id": 0},
                       *BOTH),
        "blenderbot": case("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, *BOTH),
        "m2m-100": case("M2M100ForConditionalGeneration", "M2M100Config", BART, *BOTH),
        "mvp": case("MvpForConditionalGeneration", "MvpConfig", BART, *BOTH),
        "plbart": case("PLBartForConditionalGeneration", "PLBartConfig", BART, *BOTH),
        "prophetnet": case(
            "ProphetNetForConditionalGeneration", "ProphetNetConfig",
            {"vocab_size": 120, "hidden_size": 48, "num_encoder_layers": 2, "num_decoder_layers": 2,
             "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 96,
             "decoder_ffn_dim": 96, "max_position_embeddings": 40, "use_cache": False}, *BOTH,
        ),
        "led": case(
            "LEDForConditionalGeneration", "LEDConfig",
            {**{k: v for k, v in BART.items() if k != "max_position_embeddings"}, "attention_window": [4, 4],
             "max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 40}, *BOTH,
        ),
        "longt5": case("LongT5ForConditionalGeneration", "LongT5Config", {**_T5, "local_radius": 3}, *TOKENS,
                       "decoder_input_ids"),
        "umt5": case("UMT5ForConditionalGeneration", "UMT5Config", _T5, *BOTH),
        "mt5": case("MT5ForConditionalGeneration", "MT5Config", _T5, *BOTH),
        "switch-transformers": case(
            "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
            {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, *BOTH,
        ),
        "fsmt": case(
            "FSMTForConditionalGeneration", "FSMTConfig",
            {**{k: v for k, v in BART.items() if k != "vocab_size"}, "src_vocab_size": 120, "tgt_vocab_size": 120,
             "langs": ["en", "de"]}, *BOTH,
        ),
    }  # fmt: skip
