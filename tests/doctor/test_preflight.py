"""Each check of a run on a healthy one, where it is silent, and on one that is broken in one place."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_autotune.cli.main import main
from grpo_autotune.commands import doctor as command
from grpo_autotune.commands.doctor import preflight
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.config.sources import profile_names
from grpo_autotune.doctor import inputs, surroundings
from grpo_autotune.doctor import run as run_module
from grpo_autotune.doctor.finding import Finding
from grpo_autotune.doctor.run import Run, examine
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.probe import sampler
from grpo_autotune.records.trial import TRIAL_ARGUMENTS
from tests.support.nvml import Card, with_gpus
from tests.support.sample_records import CPU_MACHINE, GIB, GPU_MACHINE

CHECKS = (*command.SLOW, *command.CHEAP)
INDEX = "model.safetensors.index.json"
OPENED = "{% if add_generation_prompt %}assistant {% endif %}"
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}" + OPENED
WORDS = ["<pad>", "<eos>", "<end>", "<unk>", "user", "system", "assistant", "what", "is", "one", "and"]


@dataclass
class World:
    """A configuration with its files, and this machine on paper; whole until a case breaks it."""

    folder: Path
    patch: pytest.MonkeyPatch
    values: dict[str, Any]
    machine: Any = CPU_MACHINE
    rows: list[dict[str, Any]] = field(default_factory=list)
    listeners: list[socket.socket] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def write(self, name: str, **values: Any) -> None:
        """Put keys into a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    def findings(self, *checks: Any) -> list[Finding]:
        (self.folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))
        return list(examine(Run(RunConfig.from_dict(self.values), self.machine), checks))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<end>"], **named)


def taken_by_others(patch: pytest.MonkeyPatch, cores: float) -> None:
    clock = itertools.count()
    patch.setattr(surroundings.time, "sleep", lambda seconds: None)
    patch.setattr(surroundings, "others_s", lambda ranks: (now := float(next(clock)), now * cores))


@pytest.fixture
def world(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", *surroundings.SUBMITTED_FROM):
        monkeypatch.delenv(name, raising=False)
    with_gpus(monkeypatch)
    taken_by_others(monkeypatch, cores=0.0)
    monkeypatch.setattr(surroundings, "TRIED_BYTES", 2**16)
    values = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "rows.jsonl"), "system_prompt": "one"},
        "rewards": [{"name": "numeric_match"}],
        "grpo": {"max_steps": 10, "save_steps": 5, "num_generations": 2, "per_device_train_batch_size": 2},
        "output": {"dir": str(tmp_path / "run")},
    }
    made = World(tmp_path, monkeypatch, values, rows=[{"prompt": "what is one", "answer": str(n)} for n in range(99)])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made.model)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    made.write("config.json", model_type="qwen3", hidden_size=8, vocab_size=len(WORDS), **sizes)
    made.write("generation_config.json", do_sample=True, eos_token_id=[1, 2], temperature=1.0)
    for number in (1, 2):
        save_file({f"w{number}": np.ones(4, np.float32)}, made.model / f"model-{number}.safetensors")
    made.write(INDEX, weight_map={"w1": "model-1.safetensors", "w2": "model-2.safetensors"})
    yield made
    for listener in made.listeners:
        listener.close()


def test_a_healthy_run_has_nothing_to_tell(world: World) -> None:
    findings = world.findings(*CHECKS)
    assert {finding.status for finding in findings} == {"ok"}, findings
    told = {finding.check: finding.detail for finding in findings}
    assert told["data"] == "99 rows with answer, prompt" and told["weights"].startswith("2 files")
    assert told["template"] == "generation ends at <eos> or <end>"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rewritten(template: str) -> Callable[[World], Any]:
    return lambda world: (world.model / "chat_template.jinja").write_text(template)


def sampled(**keys: Any) -> Callable[[World], Any]:
    return lambda world: world.write("generation_config.json", **keys)


def grpo(**keys: Any) -> Callable[[World], Any]:
    return lambda world: world.values["grpo"].update(keys)


def env(**names: str) -> Callable[[World], Any]:
    return lambda world: [world.patch.setenv(name, value) for name, value in names.items()]


def both(*breaks: Callable[[World], Any]) -> Callable[[World], Any]:
    return lambda world: [one(world) for one in breaks]


def answered(*answers: Any) -> Callable[[World], Any]:
    return lambda world: [row.update(answer=answer) for row, answer in zip(world.rows, answers, strict=False)]


def picture(world: World) -> None:
    (world.folder / "one.png").write_bytes(b"no picture")
    world.rows[98]["image"] = "one.png"


def judged(world: World) -> None:
    world.values["rewards"] = [{"name": "judge", "params": {"providers": [{"base_url": "http://localhost:9"}]}}]


def served(world: World) -> None:
    params = {"url": "http://localhost:9", "headers_env": {"Authorization": "NO_SUCH_KEY"}}
    world.values["rewards"] = [{"name": "service", "params": params}]


def gpu(world: World, **keys: Any) -> None:
    with_gpus(world.patch, Card(**keys))
    world.machine = GPU_MACHINE


def small(world: World) -> None:
    world.machine = CPU_MACHINE.model_copy(update={"memory_bytes": 1000})


def listened(world: World) -> None:
    world.patch.setenv("WORLD_SIZE", "2")
    listener = socket.create_server(("127.0.0.1", 0))
    world.patch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    world.listeners.append(listener)


def full(world: World) -> None:
    world.patch.setattr(surroundings.shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB // 2**20))
    world.write("config.json", vocab_size=10**6)


def slow_disk(world: World) -> None:
    world.patch.setattr(surroundings, "LONG_SAVE_S", 0.0)


def slow_images(world: World) -> None:
    world.patch.setattr(surroundings, "LONG_READ_S", 0.0)
    Image.new("RGB", (64, 64)).save(world.folder / "one.bmp")
    for row in world.rows:
        row["image"] = "one.bmp"


def occupied(world: World) -> None:
    (world.folder / "run").write_text("")


def dated(world: World) -> None:
    world.patch.setattr(surroundings.time, "time", lambda: 0.0)


def busy(world: World) -> None:
    taken_by_others(world.patch, cores=1.5)


def beside(world: World) -> None:
    gpu(world, percent=40)


WARNED: list[tuple[Any, Callable[[World], Any], str]] = [
    (inputs.tokenizer, lambda w: w.values["model"].update(name_or_path="no-one/has-this"), "not on this machine yet"),
    (inputs.sampling, sampled(temperature=0.6, top_k=20), "temperature 0.6, top_k 20: ignored, temperature 1.0, top_k"),
    (inputs.sampling, grpo(top_p=0.9, generation_kwargs={"top_p": 0.5}), "grpo.top_p is ignored"),
    (inputs.sampling, sampled(do_sample=False, typical_p=0.5), "typical_p 0.5 without do_sample"),
    (inputs.data, lambda w: w.values["data"].update(path="no-one/has-this"), "not on this machine yet"),
    (inputs.answers, answered("none", "5", None), "cannot read 2.0% of answer in 99 rows (row 0: 'none'): these"),
    (inputs.tokenizer, lambda w: w.write("config.json", vocab_size=7), "it has 11 tokens and the model 7"),
    (inputs.template, lambda w: w.rows[5].update(prompt="<|im_start|> one"), "1 of 99 prompts have been through"),
    (inputs.template, rewritten(TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")), "drops"),
    (inputs.template, rewritten(TEMPLATE.partition("{% if")[0]), "opens no turn"),
    (inputs.template, sampled(eos_token_id=1), "an answer's turn ends with <end>, which does not"),
    (surroundings.room, small, "of 1000 B before any activation"),
    (surroundings.disk, full, "checkpoints of"),
    (surroundings.disk, dated, "s from now"),
    (surroundings.disk_speed, slow_disk, "per checkpoint, and 0 B of images per step"),
    (surroundings.disk_speed, slow_images, "and 12.1 KiB of images per step"),
    (surroundings.loader, grpo(dataloader_num_workers=9), "9 workers of each rank on 4 cores"),
    (surroundings.launcher, both(env(SLURM_SUBMIT_DIR="/"), lambda w: w.values.pop("output")), "SLURM_SUBMIT_DIR is /"),
    (surroundings.busy, busy, "other processes took 1.50 of"),
    (surroundings.busy, beside, "40% of the GPU's time"),
]

FAILED: list[tuple[Any, Callable[[World], Any], str]] = [
    (inputs.weights, lambda w: (w.model / "model-2.safetensors").unlink(), "model-2.safetensors is missing"),
    (inputs.weights, lambda w: cut(w.model / "model-1.safetensors"), "model-1.safetensors is no whole file of weights"),
    (inputs.weights, lambda w: (w.model / "config.json").write_text("{"), "config.json is missing or is no JSON"),
    (inputs.weights, lambda w: [file.unlink() for file in w.model.glob("model*")], "there are no weights"),
    (inputs.data, lambda w: w.values["data"].update(columns={"prompt": "question"}), "no column question"),
    (inputs.data, lambda w: w.rows[3].update(prompt=""), "row 3: the prompt is ''"),
    (inputs.data, picture, "row 98: cannot read the image"),
    (inputs.data, lambda w: w.values["rewards"][0].update(params={"column": "solution"}), "no column solution"),
    (inputs.data, lambda w: w.values.update(branches={"column": "tusk", "a": {"beta": 1}}), "has no column tusk"),
    (inputs.data, lambda w: w.values.update(branches={"column": "answer", "a": {"beta": 1}}), "which is no branch"),
    (inputs.data, lambda w: w.rows.clear(), "empty"),
    (inputs.answers, answered(*["none"] * 99), "numeric_match cannot read 100% of answer in 99 rows (row 0: 'none')"),
    (inputs.tokenizer, lambda w: w.write("tokenizer_config.json", pad_token=None, eos_token=None), "neither a padding"),
    (inputs.lengths, lambda w: w.values["data"].update(max_prompt_tokens=2, prompt_overflow="error"), "row 0"),
    (inputs.template, rewritten("{{ raise_exception('no system') }}"), "no system"),
    (inputs.template, lambda w: (w.model / "chat_template.jinja").unlink(), "has no chat template"),
    (surroundings.disk, occupied, "cannot be written: "),
    (surroundings.launcher, listened, "somebody listens at MASTER_PORT"),
    (surroundings.launcher, env(WORLD_SIZE="2", MASTER_PORT="abc"), "MASTER_PORT is 'abc'"),
    (surroundings.launcher, env(WORLD_SIZE="2", MASTER_PORT="65536"), "MASTER_PORT is '65536'"),
    (surroundings.accounts, lambda w: served(w), "NO_SUCH_KEY (rewards[0].params.headers_env) is not set"),
    (surroundings.accounts, both(env(HOME="/nowhere"), grpo(report_to=["wandb"])), "wandb has no account here"),
    (surroundings.accounts, both(env(HOME="/nowhere"), grpo(push_to_hub=True)), "HF_TOKEN is not set"),
    (surroundings.endpoints, judged, "no answer from http://localhost:9"),
]


@pytest.mark.parametrize(("check", "broken", "told"), [*WARNED, *FAILED])
def test_what_is_broken_is_told_with_a_remedy(
    world: World, check: Any, broken: Callable[[World], Any], told: str, request: pytest.FixtureRequest
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN"):
        world.patch.delenv(name, raising=False)
    status = "warn" if any(broken is row[1] for row in WARNED) else "fail"
    broken(world)
    findings = [finding for finding in world.findings(check) if finding.status != "ok"]
    assert [finding.status for finding in findings] == [status], findings
    assert told in findings[0].detail and findings[0].remedy and findings[0].check == check.__name__.replace("_", " ")


def test_of_many_rows_or_pictures_a_few_are_looked_at_and_named_by_their_number(world: World) -> None:
    world.patch.setattr(run_module, "WHOLE", 60)
    world.rows *= 10
    answered("none")(world)
    world.rows[-1] = {"prompt": "what", "answer": "none"}
    told = {finding.check: finding.detail for finding in world.findings(inputs.data, inputs.answers)}
    assert told["data"] == "990 rows with answer, prompt; 52 were looked at"
    assert told["answers"].startswith("numeric_match cannot read 3.8% of answer in 52 rows (row 0: 'none')")
    world.rows[-1]["prompt"] = ""
    assert "row 989: the prompt is ''" in world.findings(inputs.data)[0].detail
    world.rows[-1]["prompt"] = "what"
    world.values["grpo"].update(per_device_train_batch_size=120)
    assert world.findings(inputs.data)[0].detail.endswith("; 62 were looked at")


def test_every_check_has_a_case_that_breaks_it() -> None:
    assert {row[0] for row in [*WARNED, *FAILED]} == set(CHECKS)


def test_one_mistake_is_told_once_and_a_broken_check_in_a_line(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(run: Run) -> Iterator[Finding]:
        raise ZeroDivisionError("no rows")
        yield

    world.values["data"]["columns"] = {"prompt": "question"}
    findings = world.findings(careless, inputs.data, inputs.answers, inputs.template)
    assert [(finding.check, finding.status) for finding in findings] == [("data", "fail")]
    assert isinstance(findings[0].error, ConfigError) and "columns.prompt" in findings[0].detail
    assert "the check `careless` was not made: ZeroDivisionError: no rows" in capsys.readouterr().err


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        status, date = 404, ""

        def do_GET(self) -> None:
            self.server.seen = dict(self.headers)  # type: ignore[attr-defined]
            self.send_response_only(self.status)
            self.send_header("Date", self.date or self.date_time_string())
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield listening
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.mark.parametrize(
    ("answer", "slow_s", "status", "told"),
    [
        ({}, 2.0, "ok", "answers in"),
        ({"status": 503}, 2.0, "warn", "answers 503"),
        ({}, -1.0, "warn", "answers 404 in"),
        ({"date": "Thu, 01 Jan 1970 00:00:00 GMT"}, 2.0, "warn", " s from this machine's"),
        ({"date": "no date"}, 2.0, "ok", "answers in"),
    ],
)
def test_endpoints(
    world: World, server: HTTPServer, answer: dict[str, Any], slow_s: float, status: str, told: str
) -> None:
    for name, value in answer.items():
        world.patch.setattr(server.RequestHandlerClass, name, value)
    world.patch.setattr(surroundings, "SLOW_S", slow_s)
    world.patch.setenv("A_KEY", "secret")
    params = {
        "url": f"http://127.0.0.1:{server.server_port}/score?token=secret",
        "headers_env": {"Authorization": "A_KEY"},
    }
    world.values["rewards"] = [{"name": "service", "params": params}]
    (finding,) = world.findings(surroundings.endpoints)
    assert finding.status == status and told in finding.detail
    assert "secret" not in str(server.seen) and "secret" not in str(finding)  # type: ignore[attr-defined]


def test_a_server_that_is_none_of_vllm(world: World, server: HTTPServer) -> None:
    world.values["grpo"]["use_vllm"] = True
    world.values["vllm"] = {"mode": "server", "server_port": server.server_port}
    (finding,) = world.findings(surroundings.endpoints)
    assert finding.status == "warn" and "/health answers 404" in finding.detail


@pytest.mark.parametrize("profile", profile_names())
def test_shipped_profiles(profile: str, world: World) -> None:
    outside = (inputs.data, inputs.answers, surroundings.endpoints)  # of the user's own files and network
    run = Run(load_config(profile), GPU_MACHINE)
    findings = list(examine(run, [check for check in CHECKS if check not in outside]))
    assert not [finding for finding in findings if finding.status == "fail"]
    assert all(finding.remedy for finding in findings if finding.status != "ok")


def test_room_of_an_engine_that_stays_awake(world: World) -> None:
    gpu(world)
    world.values["grpo"]["use_vllm"] = True
    world.values["vllm"] = {"gpu_memory_utilization": 0.95}
    (finding,) = world.findings(surroundings.room)
    assert finding.status == "warn" and "at least 76.0 GiB of 80.0 GiB" in finding.detail
    world.values["vllm"]["enable_sleep_mode"] = True
    assert world.findings(surroundings.room)[0].status == "ok"


def test_a_command_warns_in_a_line_each_and_ends_with_the_first_failure(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled(temperature=0.6)(world)
    grpo(push_to_hub=True)(world)
    env(HOME=str(world.folder))(world)
    world.patch.delenv("HF_TOKEN", raising=False)
    world.findings()
    config = RunConfig.from_dict(world.values)
    preflight(config, TRIAL_ARGUMENTS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: sampling: the model's generation_config.json says temperature 0.6: ignored")
    assert line.endswith("write grpo.temperature as wanted, which ends this line")
    with pytest.raises(EnvironmentProblem, match="push_to_hub has no account here"):
        preflight(config, {})
    (world.model / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-2\.safetensors is missing"):
        preflight(config, TRIAL_ARGUMENTS)


@pytest.mark.parametrize(
    ("cores", "given", "threads"), [(1.1, None, "1"), (9.0, None, "1"), (1.1, "2", "2"), (0.1, None, None)]
)
def test_torch_leaves_other_processes_their_cores(
    world: World, capsys: pytest.CaptureFixture[str], cores: float, given: str | None, threads: str | None
) -> None:
    world.patch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        del os.environ["OMP_NUM_THREADS"]
    world.patch.setattr(sampler, "_open_cores", lambda: {0, 1})
    world.patch.setattr(surroundings.psutil, "cpu_count", lambda logical: 2)
    before = torch.get_num_threads()
    taken_by_others(world.patch, cores)
    world.findings()
    try:
        preflight(RunConfig.from_dict(world.values), TRIAL_ARGUMENTS)
        assert os.environ.get("OMP_NUM_THREADS") == threads
        assert torch.get_num_threads() == (1 if threads == "1" else before)
    finally:
        torch.set_num_threads(before)
    assert ("; this run gets 1 thread to its end (OMP_NUM_THREADS sets another number)" in capsys.readouterr().err) == (
        threads == "1"
    )


def test_threads_are_never_more_than_torch_would_take(world: World) -> None:
    """Of 16 logical cores on 8 real ones torch takes 8 threads: one busy core leaves it those."""
    world.patch.delenv("OMP_NUM_THREADS", raising=False)
    world.patch.setattr(sampler, "_open_cores", lambda: set(range(16)))
    world.patch.setattr(surroundings.psutil, "cpu_count", lambda logical: 8)
    run = Run(RunConfig.from_dict(world.values), CPU_MACHINE)
    for cores, threads in ((1.1, None), (12.0, 4)):
        taken_by_others(world.patch, cores)
        list(examine(run, [surroundings.busy]))
        assert run.threads == threads


def test_a_process_that_is_ending_takes_no_thread(world: World) -> None:
    world.patch.delenv("OMP_NUM_THREADS", raising=False)
    looks = iter([(0.0, 0.0), (0.25, 0.25), (1.25, 0.3)])
    world.patch.setattr(sampler, "_open_cores", lambda: {0, 1})
    world.patch.setattr(surroundings, "others_s", lambda ranks: next(looks))
    run = Run(RunConfig.from_dict(world.values), CPU_MACHINE)
    assert [finding.status for finding in examine(run, [surroundings.busy])] == ["warn"]
    assert run.threads is None


def test_doctor_with_a_configuration_and_without(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def doctor(*words: str) -> tuple[int, dict[str, dict[str, str]]]:
        code = main(["doctor", "--json", *words])
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert all(set(finding) == {"check", "status", "detail", "remedy"} for finding in findings)
        return code, {finding["check"]: finding for finding in findings}

    world.patch.chdir(tmp_path)
    world.patch.setattr(command, "run_checks", lambda: [Finding("python", "ok", "3.11")])
    assert doctor() == (0, {"python": {"check": "python", "status": "ok", "detail": "3.11", "remedy": ""}})
    world.findings()
    (tmp_path / "grpo.yaml").write_text(RunConfig.from_dict(world.values).to_yaml())
    code, healthy = doctor()
    assert code == 0 and {finding["status"] for finding in healthy.values()} == {"ok"} and len(healthy) == 17
    code, broken = doctor("grpo.yaml", "--set", "data.path=nowhere.jsonl")
    assert code == 3 and "there is no file or folder nowhere.jsonl" in broken["configuration"]["detail"]
    assert "data" not in broken  # it is the same mistake
    code, unread = doctor("grpo.yaml", "--set", "grpo.betta=1")
    assert code == 3 and set(unread) == {"python", "configuration"}
    assert "grpo.betta" in unread["configuration"]["detail"] and "grpo.beta" in unread["configuration"]["remedy"]
