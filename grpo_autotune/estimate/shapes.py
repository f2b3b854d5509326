"""A model's sizes, read from its config.json alone: what the cost formulas need, and how many parameters it has.

Each family is a row that says where transformers puts biases and norms; counts are held against real models' `numel`.
Sizes are channels, counts are parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.vision_shapes import VisionShape, vision_shape
from grpo_autotune.seams.loss import EXPERT_KEYS


class Family(NamedTuple):
    """Deviation of a decoder family from the plain one; a string names the config key that says it."""

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True, head_dim=128),
    "qwen2_5_vl": Family(qkv_bias=True),
    "qwen3_vl": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True, head_dim=128),
}
"""From `transformers/models/<family>/modeling_<family>.py`; any other decoder is read as one without biases."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, and of its vision tower if it has one."""

    family: str  # `model_type` of the config
    known: bool  # whether the family is one whose parameter count is exact; others are read as a plain gated decoder
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool  # whether the LM head is the embedding
    qkv_bias: bool  # whether the query, key and value projections have a bias; `out_bias` and `mlp_bias` likewise
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # whether queries and keys are normalised over the head's channels
    vision: VisionShape | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a config.json (nested as transformers 5 writes it, or flat as older vision-language models have it).
        ConfigError where a size is missing, or the model is of a kind that these formulas do not describe (experts, a
        vision tower of another family)."""
        nested = config.get("text_config")
        text = nested if isinstance(nested, Mapping) else config
        family = str(config.get("model_type", "")).removesuffix("_text")
        experts = next((key for key in EXPERT_KEYS if text.get(key)), None)
        if experts is not None:
            raise ConfigError("mixtures of experts have no cost formulas yet", where=f"model config `{experts}`")
        vision = config.get("vision_config")
        row = FAMILIES.get(family, Family())
        hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
        return cls(
            family=family,
            known=family in FAMILIES,
            layers=_size(text, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or row.head_dim or hidden // heads),
            mlp=_size(text, "intermediate_size"),
            vocab=_size(text, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            qkv_bias=_flag(text, row.qkv_bias),
            out_bias=_flag(text, row.out_bias),
            mlp_bias=_flag(text, row.mlp_bias),
            qk_norm=row.qk_norm,
            vision=vision_shape(family, vision) if isinstance(vision, Mapping) else None,
        )

    @property
    def attention_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_weights(self) -> int:
        return self.hidden * (self.attention_width + 2 * self.kv_width)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: query, key, value, output, gate, up, down."""
        return self.qkv_weights + self.attention_width * self.hidden + 3 * self.hidden * self.mlp

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer: matrices, biases, norms."""
        biases = (self.attention_width + 2 * self.kv_width) * self.qkv_bias + self.hidden * self.out_bias
        biases += (2 * self.mlp + self.hidden) * self.mlp_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        return self.layer_weights + biases + norms

    @property
    def head_weights(self) -> int:
        """Weights of the LM head's matrix (the embedding's, where tied)."""
        return self.hidden * self.vocab

    @property
    def text_parameters(self) -> int:
        """Parameters outside the vision tower: embedding, layers, last norm, and the head if it is not tied."""
        embeddings = self.head_weights * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    @property
    def vision_parameters(self) -> int:
        return self.vision.parameters if self.vision else 0

    @property
    def parameters(self) -> int:
        """All parameters, shared ones counted once."""
        return self.text_parameters + self.vision_parameters

    def kv_bytes_per_token(self, bytes_per_value: float) -> float:
        """Bytes of keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.layers * self.kv_width * bytes_per_value


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError("the size is missing, so costs cannot be counted", where=f"model config `{key}`")
    return value


def _flag(config: Mapping[str, Any], row: bool | str) -> bool:
    return bool(config.get(row)) if isinstance(row, str) else row
