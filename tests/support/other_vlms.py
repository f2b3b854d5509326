"""Tiny vision-language models whose processors lay images out otherwise than Qwen-VL's: Idefics 3, LLaVA, Gemma 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tiny import TEXT, TEXTS
from tests.support.trainers import DEVICE as DEVICE  # mends torchvision before transformers looks for it

from grpo_autotune.train.models.random_init import CHAT_TEMPLATE, build_tokenizer  # isort: skip
import torch  # isort: skip
import transformers as tf  # isort: skip

NAMED = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tokenizer(placeholder: str) -> Any:
    tokenizer = build_tokenizer(TEXTS)
    tokenizer.add_tokens(list(NAMED.values()), special_tokens=True)
    for name, token in NAMED.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", placeholder)
    return tokenizer


def _text(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return TEXT | {"model_type": model_type, "vocab_size": len(tokenizer)} | ends | more


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    config = tf.Idefics3Config(
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        vision_config={"model_type": "idefics3_vision", "image_size": 56, "patch_size": 14} | VISION,
        text_config=_text(tokenizer, "llama"),
    )
    edge = {"longest_edge": 56}
    images = tf.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = tf.Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=4)
    return tf.Idefics3ForConditionalGeneration(config), processor


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    config = tf.LlavaConfig(
        image_token_id=tokenizer.image_token_id,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32}
        | VISION,
        text_config=_text(tokenizer, "llama"),
    )
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = tf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    config = tf.Gemma3Config(
        image_token_id=tokenizer.image_token_id,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
        vision_config={"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14} | VISION,
        text_config=_text(tokenizer, "gemma3_text", sliding_window=64, query_pre_attn_scalar=16),
    )
    images = tf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = tf.Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4)
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero: all images are alike
    return model, processor


MADE: dict[str, tuple[Callable[[Any], tuple[Any, Any]], str]] = {
    "idefics3": (_idefics3, "<image>"),
    "llava": (_llava, "<image>"),
    "gemma3": (_gemma3, "<start_of_image>"),
}
"""Kind -> its maker, and what stands for an image in a prompt."""


def other_vlm(kind: str, folder: Path) -> tuple[Path, Any]:
    """The folder of a saved model with random weights, and its processor."""
    make, placeholder = MADE[kind]
    tokenizer = _tokenizer(placeholder)
    torch.manual_seed(0)
    model, processor = make(tokenizer)
    processor.chat_template = tokenizer.chat_template
    model.generation_config = tf.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder / kind)
    return folder / kind, processor
