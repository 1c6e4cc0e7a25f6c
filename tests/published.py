"""Sizes of the published Lance_3B and the recipes that ship, for tests."""

from lance_quant.awq.config import RecipeConfig
from lance_quant.model.config import LanceConfig

PUBLISHED_SIZES = LanceConfig.from_dict(
    {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [16, 24, 24]},
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "video_token_id": 151656,
    },
    tokenizer_length=151665,
)

PUBLISHED = RecipeConfig(
    name="published",
    scoring="synthetic",
    families=["activation_over_weight"],
    source_bf16=True,
    zero_in_range=False,
    bf16_scale_codes=False,
    group_fallback=True,
)
MINMAX = RecipeConfig(name="minmax", scoring="none", folds=[])
AWQ = RecipeConfig(name="awq")
