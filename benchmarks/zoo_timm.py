"""timm's zoo with random weights, one small model of every family (module of `timm.models`): is each pruned exactly?

    python benchmarks/zoo_timm.py [FAMILY …]

Needs an environment with timm beside slimline; nothing is downloaded. A family is run by the smallest of its models
that is no mere test model. Where that is still large or deep it is built with fewer or narrower blocks, which repeat
the same operators; inputs are the smallest that it takes, or nearly.
"""

from __future__ import annotations

from typing import Any

from zoo import Case, main

SMALL: dict[str, Any] = {"img_size": 64, "depth": 3}
FOUR: dict[str, Any] = {"depths": (1, 1, 2, 1)}
SWIN: dict[str, Any] = {**FOUR, "img_size": 64, "window_size": 4, "embed_dim": 48}

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 64, {**SMALL, "embed_dim": 192, "num_heads": 3}),
    "byoanet": ("halonet_h1", 256, {}),
    "byobnet": ("mobileone_s1", 64, {}),
    "cait": ("cait_xxs24_224", 64, SMALL),
    "coat": ("coat_tiny", 64, {"img_size": 64}),
    "convit": ("convit_tiny", 64, {"img_size": 64}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("convnext_zepto_rms", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 128, {}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {**FOUR, "embed_dims": (48, 96, 192, 384)}),
    "deepseek_vit": ("deepseek_vit_412m", 84, {"depth": 3, "embed_dim": 192, "num_heads": 3}),
    "deit": ("deit_tiny_patch16_224", 64, SMALL),
    "densenet": ("densenet121", 64, {"block_config": (3, 6, 8, 4)}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("mobilenetv2_035", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64, SMALL),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "gemma4_vit": ("gemma4_vit_167m", 96, {"depth": 3, "embed_dim": 192, "num_heads": 3, "intermediate_size": 384}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_b", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64, "stages": (1, 1, 2, 1), "embed_dim": 48}),
    "hieradet_sam2": ("sam2_hiera_tiny", 128, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("mambaout_femto", 64, {}),
    "maxxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64}),
    "metaformer": ("poolformerv2_s12", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("lcnet_035", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "naflexvit": ("naflexvit_base_patch16_gap", 64, {}),
    "nasnet": ("nasnetalarge", 96, {"stem_size": 32, "num_features": 24 * 44}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {"depths": (1, 1, 5, 2)}),
    "nfnet": ("nf_regnet_b0", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64}),
    "pnasnet": ("pnasnet5large", 96, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 3, "embed_dim": 192, "num_heads": 3}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnety_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {}),
    "res2net": ("res2next50", 64, {"layers": (1, 1, 2, 1)}),
    "resnest": ("resnest14d", 64, {}),
    "resnet": ("resnet10t", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64, SWIN),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64, SWIN),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, SWIN),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tnt": ("tnt_s_patch16_224", 64, SMALL),
    "tresnet": ("tresnet_m", 64, {"layers": (1, 1, 2, 1)}),
    "twins": ("twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (32, 64, 128, 256)}),
    "vgg": ("vgg11", 32, {}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("vit_tiny_patch16_224", 64, SMALL),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 128, {"img_size": 128, "depth": 3}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", 64, {**SMALL, "embed_dim": 192, "num_heads": 3}),
    "vision_transformer_sam": (
        "samvit_base_patch16_224", 128,
        {"img_size": 128, "depth": 3, "embed_dim": 192, "num_heads": 3, "window_size": 4, "global_attn_indexes": (1,)},
    ),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("legacy_xception", 96, {}),
    "xception_aligned": ("xception41p", 64, {}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 3}),
}  # fmt: skip
"""Of every family the name of a model, the side of its input, and with which arguments it is built."""


def case(family: str) -> Case:
    """The model of a family."""

    def make() -> tuple[Any, tuple[Any, ...]]:
        import timm
        import torch

        name, side, settings = MODELS[family]
        return timm.create_model(name, pretrained=False, num_classes=10, **settings), (torch.randn(2, 3, side, side),)

    return Case(make)


if __name__ == "__main__":
    main("timm", {family: case(family) for family in MODELS}, {}, __doc__)
