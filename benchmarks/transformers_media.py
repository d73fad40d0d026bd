"""Cases of the transformers sweep that look, listen or forecast: images, video, both with text, audio, series."""

from __future__ import annotations

from typing import Any

from transformers_cases import BART, ENCODER, IMAGE, SPEECH, TOKENS, case
from zoo import Case

_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_VIT: dict[str, Any] = {**IMAGE, "mlp_ratio": 2}
_RESNET: dict[str, Any] = {
    "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "layer_type": "basic",
}  # fmt: skip
_BACKBONE: dict[str, Any] = {**_RESNET, "model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}
_DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6,
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "backbone_config": {**_RESNET, "model_type": "resnet", "out_features": ["stage4"]},
}  # fmt: skip
_SMALL = {"pixel_values": (3, 64, 64)}
_CLIP = {
    "text_config": {**ENCODER, "projection_dim": 32, "eos_token_id": 2},
    "vision_config": {**IMAGE, "projection_dim": 32},
    "projection_dim": 32,
}
_LOOK = ("input_ids", "pixel_values", "attention_mask")


def images() -> dict[str, Case]:
    pixels = "pixel_values"
    return {
        "vit": case("ViTForImageClassification", "ViTConfig", IMAGE, pixels),
        "deit": case("DeiTForImageClassification", "DeiTConfig", IMAGE, pixels),
        "swin": case("SwinForImageClassification", "SwinConfig", _SWIN, pixels),
        "swinv2": case("Swinv2ForImageClassification", "Swinv2Config", _SWIN, pixels),
        "convnext": case(
            "ConvNextForImageClassification", "ConvNextConfig",
            {"hidden_sizes": [16, 24, 32], "depths": [1, 2, 1], "num_stages": 3, "image_size": 32}, pixels,
        ),
        "convnextv2": case(
            "ConvNextV2ForImageClassification", "ConvNextV2Config",
            {"hidden_sizes": [16, 24, 32], "depths": [1, 2, 1], "num_stages": 3, "image_size": 32}, pixels,
        ),
        "clip-vision": case(
            "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**IMAGE, "projection_dim": 32}, pixels
        ),
        "dinov2": case("Dinov2ForImageClassification", "Dinov2Config", IMAGE, pixels),
        "dinov2-registers": case("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _VIT,
                                 pixels),
        "dinov3": case("DINOv3ViTModel", "DINOv3ViTConfig", {**IMAGE, "num_register_tokens": 2,
                       "intermediate_size": 192}, pixels),
        "dinov3-convnext": case(
            "DINOv3ConvNextModel", "DINOv3ConvNextConfig",
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 32}, pixels,
        ),
        "beit": case("BeitForImageClassification", "BeitConfig", IMAGE, pixels),
        "data2vec-vision": case("Data2VecVisionForImageClassification", "Data2VecVisionConfig", IMAGE, pixels),
        "ijepa": case("IJepaForImageClassification", "IJepaConfig", IMAGE, pixels),
        "vit-msn": case("ViTMSNForImageClassification", "ViTMSNConfig", IMAGE, pixels),
        "segformer": case(
            "SegformerForImageClassification", "SegformerConfig",
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
             "decoder_hidden_size": 32}, pixels,
        ),
        "segformer-segmentation": case(
            "SegformerForSemanticSegmentation", "SegformerConfig",
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
             "decoder_hidden_size": 32}, pixels,
        ),
        "mobilevit": case(
            "MobileViTForImageClassification", "MobileViTConfig",
            {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 24, 32, 40, 64]},
            pixels, **_SMALL,
        ),
        "mobilevitv2": case(
            "MobileViTV2ForImageClassification", "MobileViTV2Config",
            {"image_size": 64, "width_multiplier": 0.25, "base_attn_unit_dims": [64, 96, 128],
             "n_attn_blocks": [1, 1, 1]}, pixels, **_SMALL,
        ),
        "poolformer": case(
            "PoolFormerForImageClassification", "PoolFormerConfig",
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}, pixels, **_SMALL,
        ),
        "pvt": case(
            "PvtForImageClassification", "PvtConfig",
            {"image_size": 64, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
             "num_attention_heads": [1, 2, 4, 4]}, pixels, **_SMALL,
        ),
        "pvt-v2": case(
            "PvtV2ForImageClassification", "PvtV2Config",
            {"image_size": 64, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
             "num_attention_heads": [1, 2, 4, 4]}, pixels, **_SMALL,
        ),
        "resnet": case("ResNetForImageClassification", "ResNetConfig", _RESNET, pixels, **_SMALL),
        "resnet-bottleneck": case(
            "ResNetForImageClassification", "ResNetConfig", {**_RESNET, "layer_type": "bottleneck"}, pixels, **_SMALL
        ),
        "regnet": case(
            "RegNetForImageClassification", "RegNetConfig",
            {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1], "groups_width": 8},
            pixels, **_SMALL,
        ),
        "efficientnet": case(
            "EfficientNetForImageClassification", "EfficientNetConfig",
            {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}, pixels, **_SMALL,
        ),
        "mobilenet-v1": case(
            "MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}, pixels, **_SMALL
        ),
        "mobilenet-v2": case(
            "MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35}, pixels, **_SMALL
        ),
        "bit": case(
            "BitForImageClassification", "BitConfig",
            {"embedding_size": 32, "hidden_sizes": [64, 64, 96, 128], "depths": [1, 1, 1, 1], "num_groups": 4}, pixels,
            **_SMALL,
        ),
        "levit": case(
            "LevitForImageClassification", "LevitConfig",
            {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
             "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 4, 2, 2, 2], ["Subsample", 8, 6, 2, 2, 2], [""]]},
            pixels, **_SMALL,
        ),
        "focalnet": case(
            "FocalNetForImageClassification", "FocalNetConfig",
            {"image_size": 32, "patch_size": 2, "embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
             "focal_levels": [2, 2], "focal_windows": [3, 3]}, pixels,
        ),
        "hiera": case(
            "HieraForImageClassification", "HieraConfig",
            {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}, pixels,
            **_SMALL,
        ),
        "hgnet-v2": case(
            "HGNetV2ForImageClassification", "HGNetV2Config",
            {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
             "stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 24, 32], "stage_mid_channels": [8, 8, 16, 16],
             "stage_out_channels": [16, 24, 32, 48], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2] * 4},
            pixels, **_SMALL,
        ),
        "swiftformer": case(
            "SwiftFormerForImageClassification", "SwiftFormerConfig",
            {"image_size": 64, "embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}, pixels, **_SMALL,
        ),
        "imagegpt": case(
            "ImageGPTForImageClassification", "ImageGPTConfig",
            {"vocab_size": 120, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4, "use_cache": False},
            "input_ids",
        ),
        "vit-mae": case("ViTMAEForPreTraining", "ViTMAEConfig", {**IMAGE, "decoder_num_hidden_layers": 1,
                        "decoder_hidden_size": 32, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64},
                        pixels, "noise", outputs=2, noise=(16,)),
        "vitdet": case("VitDetBackbone", "VitDetConfig", {**_VIT, "window_size": 2, "window_block_indices": [0],
                       "residual_block_indices": [1], "pretrain_image_size": 32}, pixels),
        "sam-vision": case(
            "SamVisionModel", "SamVisionConfig",
            {**IMAGE, "output_channels": 24, "mlp_dim": 96, "window_size": 3, "global_attn_indexes": [1],
             "num_pos_feats": 16, "initializer_range": 0.02}, pixels,
        ),
        "siglip-vision": case("SiglipVisionModel", "SiglipVisionConfig", IMAGE, pixels, outputs=2),
        "aimv2": case("Aimv2VisionModel", "Aimv2VisionConfig", IMAGE, pixels, outputs=2),
        "swin2sr": case(
            "Swin2SRForImageSuperResolution", "Swin2SRConfig",
            {"image_size": 16, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
             "upscale": 2}, pixels, pixel_values=(3, 16, 16),
        ),
        "dpt": case(
            "DPTForDepthEstimation", "DPTConfig",
            {**IMAGE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
             "neck_hidden_sizes": [16, 24, 32, 32], "fusion_hidden_size": 24, "is_hybrid": False}, pixels,
        ),
        "depth-anything": case(
            "DepthAnythingForDepthEstimation", "DepthAnythingConfig",
            {"backbone_config": {**IMAGE, "model_type": "dinov2", "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4],
                                 "reshape_hidden_states": False},
             "reassemble_hidden_size": 48, "patch_size": 8, "neck_hidden_sizes": [16, 24, 32, 32],
             "fusion_hidden_size": 24, "head_hidden_size": 16}, pixels,
        ),
        "glpn": case(
            "GLPNForDepthEstimation", "GLPNConfig",
            {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
             "decoder_hidden_size": 24}, pixels, **_SMALL,
        ),
        "upernet": case(
            "UperNetForSemanticSegmentation", "UperNetConfig",
            {"hidden_size": 24, "auxiliary_channels": 16, "auxiliary_in_channels": 32,
             "backbone_config": {**_RESNET, "model_type": "resnet",
                                 "out_features": ["stage1", "stage2", "stage3", "stage4"]}}, pixels, **_SMALL,
        ),
        "maskformer": case(
            "MaskFormerForInstanceSegmentation", "MaskFormerConfig",
            {"fpn_feature_size": 32, "mask_feature_size": 32,
             "backbone_config": {**_RESNET, "model_type": "resnet",
                                 "out_features": ["stage1", "stage2", "stage3", "stage4"]},
             "decoder_config": {**_DETR, "model_type": "detr"}}, pixels, outputs=2, **_SMALL,
        ),
        "mask2former": case(
            "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig",
            {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48,
             "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 48,
             "num_queries": 6,
             "backbone_config": {**_RESNET, "model_type": "resnet",
                                 "out_features": ["stage1", "stage2", "stage3", "stage4"]}}, pixels, outputs=2,
            **_SMALL,
        ),
    }  # fmt: skip


def detection() -> dict[str, Case]:
    pixels = "pixel_values"
    return {
        "detr": case("DetrForObjectDetection", "DetrConfig", _DETR, pixels, outputs=2, **_SMALL),
        "table-transformer": case(
            "TableTransformerForObjectDetection", "TableTransformerConfig", _DETR, pixels, outputs=2, **_SMALL
        ),
        "conditional-detr": case(
            "ConditionalDetrForObjectDetection", "ConditionalDetrConfig", _DETR, pixels, outputs=2, **_SMALL
        ),
        "deformable-detr": case(
            "DeformableDetrForObjectDetection", "DeformableDetrConfig",
            {**_DETR, "decoder_layers": 2, "backbone_config": _BACKBONE, "num_feature_levels": 3}, pixels, outputs=2,
            **_SMALL,
        ),
        "yolos": case(
            "YolosForObjectDetection", "YolosConfig",
            {**IMAGE, "image_size": [64, 64], "num_detection_tokens": 6}, pixels, outputs=2, **_SMALL,
        ),
        "rt-detr": case(
            "RTDetrForObjectDetection", "RTDetrConfig",
            {"d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32],
             "feat_strides": [8, 16, 32], "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_queries": 6,
             "decoder_in_channels": [32, 32, 32], "decoder_layers": 2, "decoder_attention_heads": 4,
             "decoder_ffn_dim": 64, "num_denoising": 0, "use_timm_backbone": False,
             "backbone_config": {**_RESNET, "model_type": "rt_detr_resnet", "hidden_sizes": [16, 16, 24, 32],
                                 "out_features": ["stage2", "stage3", "stage4"]}}, pixels, outputs=2, **_SMALL,
        ),
        "owlvit-vision": case("OwlViTVisionModel", "OwlViTVisionConfig", IMAGE, pixels, outputs=2),
    }  # fmt: skip


def video_and_text() -> dict[str, Case]:
    frames = {"pixel_values": (2, 3, 32, 32)}
    video = {**IMAGE, "num_frames": 2}
    return {
        "timesformer": case("TimesformerForVideoClassification", "TimesformerConfig", video, "pixel_values", **frames),
        "videomae": case(
            "VideoMAEForVideoClassification", "VideoMAEConfig", {**video, "tubelet_size": 2}, "pixel_values", **frames
        ),
        "vivit": case(
            "VivitForVideoClassification", "VivitConfig", {**video, "tubelet_size": [2, 8, 8]}, "pixel_values", **frames
        ),
        "vjepa2": case(
            "VJEPA2ForVideoClassification", "VJEPA2Config",
            {**_VIT, "crop_size": 32, "frames_per_clip": 2, "pred_hidden_size": 32, "pred_num_hidden_layers": 1,
             "pred_num_attention_heads": 4, "num_pooler_layers": 1}, "pixel_values_videos",
            pixel_values_videos=(2, 3, 32, 32),
        ),
        "clip": case("CLIPModel", "CLIPConfig", _CLIP, *_LOOK, outputs=4),
        "siglip": case("SiglipModel", "SiglipConfig", {k: {**v, "projection_size": 48} for k, v in _CLIP.items()
                       if isinstance(v, dict)}, *_LOOK, outputs=4),
        "altclip": case("AltCLIPModel", "AltCLIPConfig", {**_CLIP, "text_config": {**ENCODER, "project_dim": 32}},
                        *_LOOK, outputs=4),
        "chinese-clip": case("ChineseCLIPModel", "ChineseCLIPConfig", _CLIP, *_LOOK, outputs=4),
        "groupvit": case(
            "GroupViTModel", "GroupViTConfig",
            {**_CLIP, "projection_intermediate_dim": 64,
             "vision_config": {**IMAGE, "depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [8, 4, 0],
                               "num_output_groups": [8, 4, 0]}}, *_LOOK, outputs=4,
        ),
        "blip": case(
            "BlipForImageTextRetrieval", "BlipConfig",
            {"text_config": {**ENCODER, "encoder_hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2,
                             "sep_token_id": 2}, "vision_config": IMAGE, "projection_dim": 32,
             "image_text_hidden_size": 24}, *_LOOK,
        ),
        "clipseg": case(
            "CLIPSegForImageSegmentation", "CLIPSegConfig",
            {**_CLIP, "extract_layers": [0, 1], "reduce_dim": 24, "decoder_num_attention_heads": 4,
             "decoder_intermediate_size": 48, "vision_config": IMAGE}, *_LOOK,
        ),
        "vilt": case(
            "ViltForImagesAndTextClassification", "ViltConfig", {**ENCODER, "image_size": 32, "patch_size": 8,
            "num_images": 1, "modality_type_vocab_size": 3}, "input_ids", "pixel_values", pixel_values=(1, 3, 32, 32),
        ),
        "visual-bert": case(
            "VisualBertForVisualReasoning", "VisualBertConfig", {**ENCODER, "visual_embedding_dim": 24}, "input_ids",
            "attention_mask", "visual_embeds", visual_embeds=(5, 24),
        ),
        "perceiver-text": case(
            "PerceiverForMaskedLM", "PerceiverConfig",
            {"vocab_size": 120, "num_latents": 8, "d_latents": 32, "d_model": 48, "num_blocks": 1,
             "num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
             "max_position_embeddings": 11, "qk_channels": 32, "v_channels": 32}, *TOKENS,
        ),
        "perceiver-image": case(
            "PerceiverForImageClassificationLearned", "PerceiverConfig",
            {"num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
             "num_self_attention_heads": 4, "num_cross_attention_heads": 1, "image_size": 8}, "inputs",
            inputs=(3, 8, 8),
        ),
        "trocr": case(
            "TrOCRForCausalLM", "TrOCRConfig",
            {"vocab_size": 120, "d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4,
             "decoder_ffn_dim": 96, "max_position_embeddings": 40, "use_cache": False}, *TOKENS,
        ),
        "mgp-str": case(
            "MgpstrForSceneTextRecognition", "MgpstrConfig",
            {"image_size": [32, 32], "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "mlp_ratio": 2.0, "max_token_length": 5, "num_character_labels": 20,
             "num_bpe_labels": 40, "num_wordpiece_labels": 40}, "pixel_values",
        ),
    }  # fmt: skip


def sound_and_series() -> dict[str, Case]:
    values = "input_values"
    whisper = {**{k: v for k, v in BART.items() if k != "max_position_embeddings"}, "num_mel_bins": 16,
               "max_source_positions": 30, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
               "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    past = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")
    lags = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 2,
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "use_cache": False}  # fmt: skip
    spans = {"past_values": (14,), "past_time_features": (14, 2), "past_observed_mask": (14,), "future_values": (4,),
             "future_time_features": (4, 2)}  # fmt: skip
    patches = {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 32}
    return {
        "whisper": case(
            "WhisperForConditionalGeneration", "WhisperConfig", whisper, "input_features", "decoder_input_ids"
        ),
        "wav2vec2": case("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, values),
        "wav2vec2-layer-norm": case(
            "Wav2Vec2ForCTC", "Wav2Vec2Config",
            {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, values,
        ),
        "hubert": case("HubertForCTC", "HubertConfig", SPEECH, values),
        "sew": case("SEWForCTC", "SEWConfig", {**SPEECH, "squeeze_factor": 2}, values),
        "sew-d": case(
            "SEWDForCTC", "SEWDConfig",
            {**SPEECH, "squeeze_factor": 2, "max_position_embeddings": 40, "position_buckets": 8}, values,
        ),
        "unispeech": case("UniSpeechForCTC", "UniSpeechConfig", SPEECH, values),
        "unispeech-sat": case("UniSpeechSatForCTC", "UniSpeechSatConfig", SPEECH, values),
        "wavlm": case("WavLMForCTC", "WavLMConfig", SPEECH, values),
        "data2vec-audio": case(
            "Data2VecAudioForCTC", "Data2VecAudioConfig",
            {**{k: v for k, v in SPEECH.items() if k != "num_conv_pos_embeddings"}, "conv_pos_kernel_size": 5,
             "num_conv_pos_embeddings": 2}, values,
        ),
        "wav2vec2-conformer": case(
            "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig",
            {**SPEECH, "conv_depthwise_kernel_size": 5, "max_source_positions": 300}, values,
        ),
        "wav2vec2-bert": case(
            "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig",
            {**{k: v for k, v in SPEECH.items() if not k.startswith(("conv", "num_conv"))},
             "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5}, "input_features",
            input_features=(20, 16),
        ),
        "speecht5-encoder": case(
            "SpeechT5ForSpeechToText", "SpeechT5Config",
            {**SPEECH, "vocab_size": 120, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96,
             "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "use_cache": False}, values,
            "decoder_input_ids",
        ),
        "speech-to-text": case(
            "Speech2TextForConditionalGeneration", "Speech2TextConfig",
            {**{k: v for k, v in BART.items() if k != "max_position_embeddings"}, "max_source_positions": 60,
             "max_target_positions": 20, "input_feat_per_channel": 16, "conv_channels": 32}, "input_features",
            "decoder_input_ids", input_features=(40, 16),
        ),
        "ast": case(
            "ASTForAudioClassification", "ASTConfig",
            {**IMAGE, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}, values,
            input_values=(32, 16),
        ),
        "clap-audio": case(
            "ClapAudioModelWithProjection", "ClapAudioConfig",
            {"spec_size": 32, "num_mel_bins": 8, "window_size": 4, "patch_size": 2, "patch_stride": [2, 2],
             "depths": [2, 2], "num_attention_heads": [2, 4], "hidden_size": 48, "patch_embeds_hidden_size": 24,
             "projection_dim": 32, "enable_fusion": False}, "input_features", input_features=(1, 64, 8),
        ),
        "encodec": case(
            "EncodecModel", "EncodecConfig",
            {"num_filters": 8, "hidden_size": 32, "codebook_size": 32, "codebook_dim": 32, "upsampling_ratios": [4, 2],
             "num_lstm_layers": 1, "target_bandwidths": [24.0]}, values, input_values=(1, 400),
        ),
        "informer": case("InformerModel", "InformerConfig", lags, *past, **spans),
        "time-series": case("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", lags, *past, **spans),
        "patchtst": case(
            "PatchTSTForPrediction", "PatchTSTConfig",
            {**patches, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "prediction_length": 6,
             "loss": "mse"}, "past_values", past_values=(32, 3),
        ),
        "patchtsmixer": case(
            "PatchTSMixerForPrediction", "PatchTSMixerConfig",
            {**patches, "num_layers": 2, "prediction_length": 6, "loss": "mse"}, "past_values", past_values=(32, 3),
        ),
    }  # fmt: skip
