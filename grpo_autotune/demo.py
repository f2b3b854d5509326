"""The built-in demo: a small Qwen3-VL that reads handwritten digits, complete and without a network.

The images are real handwriting (the optical digits that come with scikit-learn), each drawn at a random place of a
larger canvas, so a smaller image is a harder one. The model has Qwen3-VL's own architecture with about two million
parameters. A short supervised warm start gives it what GRPO needs to begin: it mostly recognises the digit, and
answers in several forms, many of them wrong. GRPO then has to find the form and the digit that earn the reward.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_autotune.console import ProgressBar
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import cache_dir
from grpo_autotune.hardware.seeded import seeded
from grpo_autotune.train.models.random_init import (
    CHAT_TEMPLATE,
    build_processor,
    build_tokenizer,
    built_once,
    random_model,
    save_model,
    with_tokenizer,
)
from grpo_autotune.units import percent

QUESTION = "Which digit is shown?"
FORMS = ("<answer>{}</answer>", "{}", "It is {}.")
"""Forms of the warm start's answers; the demo's rewards accept the first."""

CANVAS_PX, DIGIT_PX, RASTER_PX = 96, 32, 16
"""Sides of image and digit, and the step between places: a patch of the vision tower, so that few examples suffice."""

HELD_OUT = 300
"""Digits of the 1797 that only the split `test` shows."""

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": True,
    "image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0,
    "text_config": {
        "model_type": "qwen3_vl_text", "vocab_size": 0, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.05, "max_position_embeddings": 2048,
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [6, 5, 5],
        },
    },
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
        "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 128, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1], "initializer_range": 0.05,
    },
}  # fmt: skip
"""Token ids and vocabulary size are filled in from the tokenizer."""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Recipe:
    """The warm start."""

    see_steps: int = 110  # in which the vision tower learns to tell digits apart, by a layer that is then dropped
    say_steps: int = 140  # in which the whole model learns to answer
    slip_steps: int = 40  # the last of these, in which some of the answers are wrong
    batch: int = 32  # images per step
    learning_rate: float = 2e-3  # AdamW's, at its highest
    wrong_share: float = 0.45  # of those steps' answers the share whose digit is drawn at random
    form_shares: tuple[float, ...] = (0.5, 0.25, 0.25)  # of each of `FORMS`
    seed: int = 0  # of weights, order and places

    @property
    def steps(self) -> int:
        return self.see_steps + self.say_steps


@dataclass(frozen=True)
class Digits:
    """N handwritten digits: `pixels` [N, DIGIT_PX, DIGIT_PX] from 0 to 255, and `labels` [N]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def load_digits(split: str) -> Digits:
    """The digits of a split, `train` or `test`, which is fixed; ConfigError for another one.

    The images are the test part of E. Alpaydin and C. Kaynak's "Optical Recognition of Handwritten Digits" (UCI, 1998):
    13 writers' digits in 8x8 grey values, as scikit-learn ships them."""
    from PIL import Image
    from sklearn import datasets as sklearn_datasets

    if split not in ("train", "test"):
        raise ConfigError(f"digits has no split {split!r}", where="data.split", fix="Use train or test.")
    bunch = sklearn_datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    chosen = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    grey = np.clip(bunch.images[chosen] * (255 / 16), 0, 255).astype(np.uint8)
    side = (DIGIT_PX, DIGIT_PX)
    pixels = np.stack([np.asarray(Image.fromarray(one).resize(side, Image.Resampling.BILINEAR)) for one in grey])
    return Digits(pixels, bunch.target[chosen].astype(np.int64))


def draw(pixels_HW: NDArray[np.uint8], canvas: int, random: np.random.Generator) -> Any:
    """A digit at a random place of a black square of `canvas` pixels a side, as a PIL image (RGB)."""
    from PIL import Image

    height, width = pixels_HW.shape
    top = RASTER_PX * int(random.integers(0, (canvas - height) // RASTER_PX + 1))
    left = RASTER_PX * int(random.integers(0, (canvas - width) // RASTER_PX + 1))
    picture = np.zeros((canvas, canvas, 3), np.uint8)
    picture[top : top + height, left : left + width] = pixels_HW[..., None]
    return Image.fromarray(picture)


def digits_dataset(split: str, *, canvas: int = CANVAS_PX, count: int | None = None, seed: int = 0) -> Any:
    """Questions about handwritten digits, one image each: a `datasets.Dataset` with `prompt` (messages), `image` and
    `answer` (the digit as text). The splits `train` and `test` share no digit.

    A row for each digit, or `count`; more than there are digits repeat them at other places, which the seed draws, as
    the order. ConfigError for another split, or a canvas (a side in pixels) too small for a digit."""
    import datasets

    if canvas < DIGIT_PX:
        what = f"a digit of {DIGIT_PX} pixels does not fit on a canvas of {canvas}"
        raise ConfigError(what, where="data.params.canvas", fix=f"Set it to {DIGIT_PX} or more.")
    digits = load_digits(split)
    random = np.random.default_rng(seed)
    count = len(digits.labels) if count is None else count
    rounds = -(-count // len(digits.labels))
    order = np.concatenate([random.permutation(len(digits.labels)) for _ in range(rounds)])[:count]
    features = datasets.Features(
        prompt=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        image=datasets.Image(),
        answer=datasets.Value("string"),
    )
    columns = {
        "prompt": [[{"role": "user", "content": QUESTION}]] * count,
        "image": [draw(digits.pixels[index], canvas, random) for index in order],
        "answer": [str(digits.labels[index]) for index in order],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def demo_model_path(recipe: Recipe | None = None, progress: Progress | None = None) -> Path:
    """Folder of the demo's model, built on first use and kept in the cache folder; a changed recipe is built anew.
    `progress` is told the share done, 0 to 1; by default there is a bar on standard error."""
    recipe = recipe or Recipe()
    facts = [CONFIG, asdict(recipe), CHAT_TEMPLATE, QUESTION, FORMS, CANVAS_PX, DIGIT_PX, RASTER_PX, HELD_OUT]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir("demo") / f"qwen3-vl-digits-{key}"
    with built_once(folder) as missing:
        if missing:
            with _progress_bar(recipe.steps) if progress is None else nullcontext(progress) as told:
                model, processor = warm_start(recipe, told)
            save_model(model, processor, folder)
    return folder


@contextmanager
def _progress_bar(steps: int) -> Iterator[Progress]:
    """Show the share done: a bar on a terminal, a line at each fifth of the way elsewhere."""
    title = "building the demo model (once)"
    with ProgressBar(title, steps) as bar:

        def show(share: float) -> None:
            done = round(share * steps)
            left, at_fifth = bar.time_left(done), done * 5 // steps > (done - 1) * 5 // steps
            bar.update(done, left, f"{title}: {percent(share)} done, {left}" if at_fifth else None)

        yield show


def warm_start(recipe: Recipe, progress: Progress) -> tuple[Any, Any]:
    """Train the demo's model (float32) from random weights; that and its processor. torch's random state stays."""
    tokenizer = build_tokenizer([QUESTION, "system user assistant", *(form.format(7) for form in FORMS)] * 3)
    config = with_tokenizer(CONFIG, tokenizer)
    processor = build_processor(config, tokenizer, min_pixels=32 * 32)
    digits, random = load_digits("train"), np.random.default_rng(recipe.seed)

    def told(step: float) -> None:
        progress(step / recipe.steps)

    with seeded(recipe.seed), _one_thread():
        model = random_model(config, seed=recipe.seed)
        model.train()
        with _patches_by_matmul(model.model.visual):
            _learn_to_see(model, processor, digits, recipe, random, told)
            _learn_to_say(model, processor, digits, recipe, random, lambda step: told(recipe.see_steps + step))
    return model.eval(), processor


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: the steps are small, so threads would mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _patches_by_matmul(tower: Any) -> Iterator[None]:
    """Compute the patch embedding as a matrix product, much faster on a CPU; patches do not overlap."""
    import torch

    convolution = tower.patch_embed.proj
    convolution.forward = lambda patches: torch.nn.functional.linear(
        patches.flatten(1), convolution.weight.flatten(1), convolution.bias
    )
    try:
        yield
    finally:
        del convolution.forward


def _learn_to_see(
    model: Any, processor: Any, digits: Digits, recipe: Recipe, random: np.random.Generator, told: Progress
) -> None:
    """Train the vision tower to tell which digit is in the image: a linear layer over each feature's maximum."""
    import torch

    tower = model.model.visual
    head = torch.nn.Linear(CONFIG["vision_config"]["out_hidden_size"], 10)

    def loss(step: int) -> Any:
        chosen = random.integers(0, len(digits.labels), recipe.batch)
        images = [draw(digits.pixels[index], CANVAS_PX, random) for index in chosen]
        pixels = processor.image_processor(images, return_tensors="pt")
        tokens_TC = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        features_BC = tokens_TC.unflatten(0, (recipe.batch, -1)).amax(1)
        return torch.nn.functional.cross_entropy(head(features_BC), torch.from_numpy(digits.labels[chosen]))

    _descend([*tower.parameters(), *head.parameters()], loss, recipe.see_steps, recipe.learning_rate, told)


def _learn_to_say(
    model: Any, processor: Any, digits: Digits, recipe: Recipe, random: np.random.Generator, told: Progress
) -> None:
    """Train the whole model on answers of every form, at first all right, then `wrong_share` of them not."""

    def loss(step: int) -> Any:
        wrong_share = 0.0 if step < recipe.say_steps - recipe.slip_steps else recipe.wrong_share
        chosen = random.integers(0, len(digits.labels), recipe.batch)
        images = [draw(digits.pixels[index], CANVAS_PX, random) for index in chosen]
        said = np.where(
            random.random(recipe.batch) < wrong_share, random.integers(0, 10, recipe.batch), digits.labels[chosen]
        )
        forms = random.choice(FORMS, recipe.batch, p=recipe.form_shares)
        answers = [str(form).format(digit) for form, digit in zip(forms, said, strict=True)]
        return model(**answered(processor, images, answers)).loss

    _descend(list(model.parameters()), loss, recipe.say_steps, recipe.learning_rate, told)


def answered(processor: Any, images: Sequence[Any], answers: Sequence[str]) -> dict[str, Any]:
    """Model inputs for the question about each of B images of one size, and its answer, which alone has labels."""
    import torch

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = dict(processor(text=[prompt] * len(images), images=list(images), return_tensors="pt"))
    tokenizer = processor.tokenizer
    spoken = tokenizer(
        [answer + tokenizer.eos_token for answer in answers], padding=True, padding_side="right", return_tensors="pt"
    )
    labels_BA = spoken["input_ids"].masked_fill(spoken["attention_mask"] == 0, -100)
    labels_BT = torch.cat([torch.full_like(inputs["input_ids"], -100), labels_BA], 1)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([inputs[name], spoken[name]], 1)
    kinds_BP = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([kinds_BP, kinds_BP.new_zeros(labels_BA.shape)], 1)
    return inputs | {"labels": labels_BT}


def _descend(
    parameters: Sequence[Any], loss: Callable[[int], Any], steps: int, learning_rate: float, told: Progress
) -> None:
    """Minimise with AdamW: a warm-up of 30 steps, then a linear decay to a twentieth of the learning rate."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / steps)
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        told(float(step + 1))
