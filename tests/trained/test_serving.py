"""The `vllm serve` for trained weights, what vLLM cannot serve, and the answer that is held against the trainer's."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from grpo_autotune.commands.serve import is_trained
from grpo_autotune.config.sections.vllm import vllm_section
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.rollout.server.command import Serving
from grpo_autotune.rollout.server.process import Weights
from grpo_autotune.trained.agreement import Answer, check_answer
from grpo_autotune.trained.serving import served_weights, serving_trained
from grpo_autotune.trained.source import base_section, find_trained
from tests.commands.test_serve_cli import options
from tests.support.training import text_config

LORA = {"peft_type": "LORA", "base_model_name_or_path": "owner/name", "r": 8, "lora_alpha": 16}
TEXT = {"model_type": "qwen3", "dtype": "float32"}
EYES = {"model_type": "qwen3_vl", "vision_config": {}, "text_config": {"dtype": "bfloat16"}}
NAMES = ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",)
TOWER = ("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight",)


def adapter(folder: Path, names: tuple[str, ...] = NAMES, **keys: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **keys}))
    save_file({name: torch.zeros(1) for name in names}, folder / "adapter_model.safetensors")
    return folder


def served(place: Path, model: dict[str, Any] = TEXT, gpus: tuple[str, ...] = (), **given: Any) -> Serving:
    return serving_trained(find_trained(place), Weights("owner/name", model), vllm_section(given), gpus)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder `sums`, with a vLLM section and a checkpoint."""
    vllm = {"gpu_memory_utilization": 0.3, "max_model_len": 512, "mode": "colocate", "enforce_eager": True}
    config = text_config(Path("owner/name"), tmp_path, {"vllm": vllm}, use_vllm=True)
    template = {"chat_template_kwargs": {"enable_thinking": False}}
    config = config.model_copy(update={"grpo": {**config.grpo, **template}})
    folder = tmp_path / "sums"
    adapter(folder / "model")
    adapter(folder / "checkpoints" / "checkpoint-4", rank_pattern={"q_proj": 20}, alpha_pattern={"q_proj": 40})
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    (checkpoint / "complete.json").write_text(json.dumps({"files": {"adapter_config.json": (
        checkpoint / "adapter_config.json").stat().st_size}}))  # fmt: skip
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_an_adapter_is_served_beside_its_base_and_named_by_its_run(run: Path) -> None:
    line = served(run)
    assert line.model == "owner/name" and line.environment == {}
    assert options(line) == {
        "host": "127.0.0.1",
        "port": "8000",
        "dtype": "float32",
        "chat-template": str(run / "model" / "chat_template.jinja"),
        "default-chat-template-kwargs": '{"enable_thinking": false}',
        "enable-lora": True,
        "lora-modules": f"sums={run / 'model'}",
        "max-lora-rank": "8",
        "max-loras": "1",
    }
    given = served(run, gpus=("2", "3"), gpu_memory_utilization=0.8, server_port=9000)
    assert (options(given)["gpu-memory-utilization"], given.port) == ("0.8", 9000)
    assert options(given)["tensor-parallel-size"] == "2" and given.environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_a_second_adapter_in_the_folder_has_the_template_of_the_first(run: Path) -> None:
    line = options(served(adapter(run / "model" / "ref")))
    assert line["chat-template"] == str(run / "model" / "chat_template.jinja")
    assert line["lora-modules"] == f"sums-ref={run / 'model' / 'ref'}"


def test_room_for_the_largest_rank_of_a_checkpoint(run: Path) -> None:
    line = options(served(run / "checkpoint-4"))
    assert line["max-lora-rank"] == "32"
    assert str(line["lora-modules"]).startswith("sums-checkpoint-4=")


def test_an_adapter_on_the_vision_tower_has_its_flag(tmp_path: Path) -> None:
    place = adapter(tmp_path / "eyes", (*NAMES, *TOWER))
    assert options(served(place, EYES))["enable-tower-connector-lora"] is True
    assert "enable-tower-connector-lora" not in options(served(adapter(tmp_path / "text"), EYES))
    with pytest.raises(ConfigError, match=r"on the vision tower of gemma3, which works for .* grpo-autotune merge"):
        served(place, {**EYES, "model_type": "gemma3"})


def test_whole_weights_have_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TEXT))
    line = options(served(folder))
    assert line["served-model-name"] == "whole" and "enable-lora" not in line


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens is trained whole"),
        ({"bias": "all"}, "it has biases"),
        ({"lora_bias": True}, "it has biases"),
        ({"trainable_token_indices": [1]}, "not only linear layers are adapted"),
        ({"rank_pattern": {"q_proj": 4}}, "its layers have different scales"),
        ({"peft_type": "IA3"}, "it is IA3, not LoRA"),
        ({"r": 600}, "up to rank 512, and this one has 600"),
    ],
)
def test_what_vllm_cannot_serve_is_to_be_merged(tmp_path: Path, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"{reason}.*Merge it, and serve what comes out: grpo-autotune merge"):
        served(adapter(tmp_path / "adapter", **keys))


def test_an_adapter_that_is_cut_short(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(ConfigError, match=r"the adapter cannot be read: .* The folder was not saved whole"):
        served(folder)


def test_the_weights_beneath_are_read_where_they_are(tmp_path: Path) -> None:
    whole, gone = tmp_path / "whole", tmp_path / "gone"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(TEXT))
    beside = adapter(tmp_path / "adapter", base_model_name_or_path=str(whole))
    for place in (whole, beside):
        assert served_weights(base_section(find_trained(place))) == Weights(str(whole), TEXT)
    with pytest.raises(ConfigError, match=f"^model.name_or_path: .*{gone}"):
        served_weights(base_section(find_trained(adapter(tmp_path / "other", base_model_name_or_path=str(gone)))))


@pytest.mark.parametrize(
    ("words", "trained"),
    [("sums", True), ("sums/checkpoint-4", True), ("sums/best", True), ("sums/config.yaml", False), ("demo", False)],
)
def test_a_run_is_told_from_a_configuration(
    run: Path, monkeypatch: pytest.MonkeyPatch, words: str, trained: bool
) -> None:
    monkeypatch.chdir(run.parent)
    assert is_trained(words) is trained


@pytest.mark.parametrize("words", ["demo", "my.yml", "grpo.yaml", "neither"])
def test_a_folder_of_old_checkpoints_makes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    (tmp_path / "checkpoints_old").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_trained(words)
    (tmp_path / "checkpoints").mkdir()
    assert is_trained(words) is (words == "neither")


ANSWER = Answer("row 0", {"prompt": [5, 6]}, [5, 6], [1, 2], [-0.5, -0.25], [-3.0, -2.0], "float32")
Steps = list[tuple[int, dict[int, float]]]


@pytest.fixture
def serving() -> Iterator[Callable[[Steps], str]]:
    """`serving(steps)`: address of an HTTP server that answers as vLLM does, with these tokens and log-probs."""
    servers: list[http.server.HTTPServer] = []

    def start(steps: Steps) -> str:
        words = [{f"token_id:{key}": logp for key, logp in top.items()} for _, top in steps]
        logprobs = {"tokens": [f"token_id:{token}" for token, _ in steps], "top_logprobs": words}
        body = json.dumps({"choices": [{"logprobs": logprobs, "prompt_token_ids": [5, 6]}]}).encode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: Any) -> None:
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_an_answer_that_agrees_is_told_with_figures(serving: Callable[[Steps], str]) -> None:
    warned: list[str] = []
    address = serving([(1, {1: -0.5001, 2: -1.0}), (2, {2: -0.25})])
    line = check_answer(address, "sums", ANSWER, warned.append)
    assert line == (
        "checked on row 0: 2 of 2 greedy tokens are the trainer's, log-probs 5e-05 nats apart on average and 0.0001 at "
        "most (the base alone: 2.1 on average)"
    )
    assert not warned
    near = ANSWER._replace(base=[-0.50015, -0.25])
    check_answer(address, "sums", near, warned.append)
    assert warned == ["this prompt cannot tell the adapter from its base: they are 7.5e-05 nats apart"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([(1, {1: -0.6}), (2, {2: -0.25})], "answers as another model than the one that was trained: 2 of 2"),
        ([(3, {3: -0.1, 1: -3.0}), (7, {7: -0.1})], "0 of 2 greedy tokens are the trainer's, log-probs 2.5 nats"),
        ([(3, {3: -0.1, 4: -9.0})], "log-probs 8.5 nats"),
    ],
)
def test_an_answer_of_another_model_is_an_error(serving: Callable[[Steps], str], steps: Steps, said: str) -> None:
    with pytest.raises(EnvironmentProblem, match=said):
        check_answer(serving(steps), "sums", ANSWER, str)


@pytest.mark.slow
def test_a_prompt_that_is_read_otherwise_is_an_error(serving: Callable[[Steps], str]) -> None:
    with pytest.raises(EnvironmentProblem, match="reads the prompt as 2 tokens, and the trainer as 3 others"):
        check_answer(serving([(1, {1: 0.0})]), "sums", ANSWER._replace(prompt=[5, 6, 7]), str)


@pytest.mark.slow
def test_a_server_that_refuses_is_an_error(serving: Callable[[Steps], str]) -> None:
    with pytest.raises(EnvironmentProblem, match="the server gives no answer"):
        check_answer(serving([]), "sums", ANSWER, str)
