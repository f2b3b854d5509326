"""Models with random weights that load like downloaded ones: real architecture, real files, a tokenizer trained here.

A folder written here holds config, weights, generation config and tokenizer (for vision models the whole processor), so
that transformers, TRL and vLLM take its path as they take any model's. Two kinds of tokenizer: *compact* (no more ids
than it needs) for tiny models, and *padded* to the real vocabulary with Qwen's own ids for the special tokens, so that
every id a random model can sample decodes.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.estimate.architectures import architecture
from grpo_autotune.files import cache_dir
from grpo_autotune.hardware.seeded import seeded
from grpo_autotune.seams.torchvision_compat import ensure_torchvision

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen's, in the order of its ids
(https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/blob/main/tokenizer_config.json)."""

FIRST_SPECIAL_ID = 151643
"""Id of `<|endoftext|>` in every Qwen2, Qwen2.5 and Qwen3 tokenizer; the others follow it."""

EOS, PAD = "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as the Qwen-VL models write it: strings, or lists of text, image and video parts."""

TOKEN_ID_KEYS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "processor": "Qwen2_5_VLProcessor", "video": "Qwen2VLVideoProcessor",
        "mean": CLIP_MEAN, "std": CLIP_STD, "pixels": (56 * 56, 16384 * 28 * 28),
    },
    "qwen3_vl": {
        "processor": "Qwen3VLProcessor", "video": "Qwen3VLVideoProcessor",
        "mean": [0.5] * 3, "std": [0.5] * 3, "pixels": (256 * 16 * 16, 16384 * 32 * 32),
    },
}  # fmt: skip
"""By `model_type`: processor classes, and the numbers of the real models' preprocessor_config.json (`pixels`: least and
most of an image; https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/preprocessor_config.json and
https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/blob/main/preprocessor_config.json)."""

WORDS = (
    "The quick brown fox jumps over the lazy dog. What is shown in the image? Answer with a number or a word.",
    "Question: how many apples are left? Let us think step by step. <think>reasoning</think> <answer>42</answer>",
)
"""What the padded tokenizer is trained on; all other text falls back to bytes."""


def build_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> Any:
    """Train a byte-level BPE on `texts`, as a `transformers.Qwen2Tokenizer`: ChatML, vision tokens, left padding,
    `<|im_end|>` as end and `<|endoftext|>` as padding token. Anything else still encodes, byte by byte.

    The vocabulary is compact (special tokens at its end), or has `vocab_size` ids, all of which decode; from 151657 ids
    on the special tokens stand at Qwen's own ids, below that at the end."""
    from transformers import Qwen2Tokenizer

    vocab, merges = _train_bpe(texts)
    if vocab_size is None:
        vocab_size = len(vocab) + len(SPECIAL_TOKENS)
    first_special = min(FIRST_SPECIAL_ID, vocab_size - len(SPECIAL_TOKENS))
    if first_special < len(vocab):
        raise ValueError(f"vocab_size {vocab_size} leaves no room beside {len(vocab)} learned and byte tokens")
    specials = dict(zip(SPECIAL_TOKENS, range(first_special, vocab_size), strict=False))
    taken = set(vocab.values()) | set(specials.values())
    fillers = {f"<|unused_{index}|>": index for index in range(vocab_size) if index not in taken}
    return Qwen2Tokenizer(
        vocab=vocab | specials | fillers,
        merges=merges,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=None,
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges over bytes, split into words as Qwen splits them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(list(texts), trainer=trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def with_tokenizer(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The config with the tokenizer's vocabulary size and token ids in every place that names one."""
    fitted: dict[str, Any] = json.loads(json.dumps(dict(config)))
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for part in (fitted, fitted.get("text_config")):
        if part is not None and "vocab_size" in part:
            part.update(ids, vocab_size=len(tokenizer))
    for key, token in TOKEN_ID_KEYS.items():
        if key in fitted:
            fitted[key] = tokenizer.convert_tokens_to_ids(token)
    return fitted


def empty_model(config: Mapping[str, Any]) -> Any:
    """The model of a config.json without memory for its weights (torch's meta device): for counting parameters."""
    import torch

    with torch.device("meta"):
        return _model_class(config)(_config_object(config))


def random_model(config: Mapping[str, Any], *, dtype: str = "float32", seed: int = 0, device: Any = None) -> Any:
    """The model of a config.json with weights drawn as transformers draws them, in a torch dtype by its name; torch's
    random state is left alone. They are drawn, and stay, on `device` (None: the host), other ones from the same seed on
    each kind."""
    import torch

    with seeded(seed, device), nullcontext() if device is None else device:
        return _model_class(config)._from_config(_config_object(config), dtype=getattr(torch, dtype))


def _config_object(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    body = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(body)))


def _model_class(config: Mapping[str, Any]) -> Any:
    ensure_torchvision()
    import transformers

    return getattr(transformers, config["architectures"][0])


def build_processor(config: Mapping[str, Any], tokenizer: Any, *, min_pixels: int | None = None) -> Any:
    """The processor of a vision model by its config.json, else the tokenizer itself: both turn the model's input into
    tensors. Images of fewer than `min_pixels` are enlarged to this area; None is the real model's value."""
    facts = PROCESSORS.get(config["model_type"])
    if facts is None:
        return tokenizer
    ensure_torchvision()
    import transformers

    vision = config["vision_config"]
    sizes = {name: vision[name] for name in ("patch_size", "temporal_patch_size")}
    sizes["merge_size"] = vision["spatial_merge_size"]
    least, most = facts["pixels"]
    image_processor = transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": min_pixels or least, "longest_edge": most},
        image_mean=facts["mean"],
        image_std=facts["std"],
        **sizes,
    )
    return getattr(transformers, facts["processor"])(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=getattr(transformers, facts["video"])(**sizes),
        chat_template=tokenizer.chat_template,
    )


def save_model(model: Any, processor: Any, folder: Path) -> Path:
    """Write model, generation config and processor so that the folder, which must not exist yet, exists whole or not at
    all; if another process finishes it first, that one's stays."""
    from transformers import GenerationConfig

    tokenizer = getattr(processor, "tokenizer", processor)
    ends = tokenizer.convert_tokens_to_ids([EOS, PAD])
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        whole = Path(scratch) / "model"
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        if not folder.exists():
            whole.rename(folder)
    return folder


def save_random_model(
    config: Mapping[str, Any],
    folder: Path,
    *,
    tokenizer: Any = None,
    min_pixels: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    device: Any = None,
) -> Path:
    """Build a model of a config.json with random weights, write it with its tokenizer or processor into `folder`, which
    must not exist yet, and return that. The config's vocabulary is cut to a compact tokenizer; without one it gets a
    padded one. `min_pixels` is as in `build_processor`, the rest as in `random_model`."""
    if tokenizer is None:
        text = config.get("text_config") or config
        tokenizer = build_tokenizer(WORDS, vocab_size=text["vocab_size"])
    else:
        config = with_tokenizer(config, tokenizer)
    model = random_model(config, dtype=dtype, seed=seed, device=device)
    return save_model(model, build_processor(config, tokenizer, min_pixels=min_pixels), folder)


def random_model_path(name: str, dtype: str = "auto", notify: Callable[[str], None] | None = None) -> Path:
    """Folder of a real architecture (a row of `estimate.architectures`) with random weights, built on first use and
    kept in the cache folder. "auto" is bfloat16, as the real models are stored; `notify` is told, in one line, what is
    about to be built and how large it is. ConfigError where the name is not in the table, EnvironmentProblem where the
    cache folder's disk has no room for it."""
    config = architecture(name).config
    dtype = "bfloat16" if dtype == "auto" else dtype
    recipe = hashlib.sha256(json.dumps([config, WORDS, CHAT_TEMPLATE, dtype], sort_keys=True).encode()).hexdigest()
    folder = cache_dir("random-init") / f"{name}-{dtype}-{recipe[:12]}"
    with built_once(folder) as missing:
        if missing:
            import torch

            numbers = sum(int(weight.numel()) for weight in empty_model(config).parameters())
            size_bytes = numbers * getattr(torch, dtype).itemsize
            _require_disk(folder.parent, size_bytes, name)
            if notify is not None:
                notify(f"building {name} with random weights, {size_bytes / 1e9:.1f} GB, in {folder}")
            _save_drawn_fast(config, folder, dtype)
    return folder


def _save_drawn_fast(config: Mapping[str, Any], folder: Path, dtype: str) -> None:
    """Build the model on the GPU that this process uses, where it has room: a host takes a minute for billions of
    weights. A process that has not begun to use one, such as a search, does not begin for this."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            save_random_model(config, folder, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()))
            return
        except torch.OutOfMemoryError:
            pass
        finally:
            torch.cuda.empty_cache()
    save_random_model(config, folder, dtype=dtype)


@contextmanager
def built_once(folder: Path) -> Iterator[bool]:
    """Hold the lock beside `folder` and say whether it is still to be built, so that one process builds it."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        yield False
        return
    with FileLock(folder.parent / f".{folder.name}.lock"):
        yield not folder.exists()


def _require_disk(folder: Path, size_bytes: int, name: str) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes * 1.05:
        what = f"{name} needs {size_bytes / 1e9:.1f} GB of disk and {free_bytes / 1e9:.1f} GB are free"
        fix = "Free some room, or point GRPO_AUTOTUNE_CACHE at another disk."
        raise EnvironmentProblem(what, where=str(folder), fix=fix)
