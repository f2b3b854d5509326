"""The framework of a file, the one command of a script, and a line for what is none."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.importing import FRAMEWORKS, import_file, read_source
from grpo_autotune.interop.source import Setting, Source

OPEN_R1 = "accelerate launch --num_processes=7 src/open_r1/grpo.py"


def source(folder: Path, name: str, text: str, framework: str | None = None, **environment: str) -> Source:
    (folder / name).write_text(text)
    return read_source(folder / name, framework, environment)


@pytest.mark.parametrize(
    ("text", "framework", "program"),
    [
        ("python3 -m verl.trainer.main_ppo data.x=1", "verl", "verl.trainer.main_ppo"),
        ("python -m recipe.dapo.main_dapo a.b=1", "verl", "recipe.dapo.main_dapo"),
        ("python3 main_custom.py actor_rollout_ref.actor.x=1", "verl", "main_custom.py"),
        ("ray job submit --working-dir . -- python3 -m verl.trainer.main_ppo a.b=1", "verl", "verl.trainer.main_ppo"),
        ("uv run --extra vllm python3 -u -m verl.trainer.main_ppo a.b=1", "verl", "verl.trainer.main_ppo"),
        ("python3 -m verl.trainer.main worker.actor.x=1", "easyr1", "verl.trainer.main"),
        ("NPROC_PER_NODE=2 swift rlhf --rlhf_type grpo", "ms-swift", "swift rlhf"),
        ("megatron rlhf --rlhf_type grpo", "ms-swift", "megatron rlhf"),
        ("torchrun --nproc_per_node 2 swift/cli/rlhf.py --x 1", "ms-swift", "swift/cli/rlhf.py"),
        ("trl grpo --model_name_or_path a/b", "trl", "trl grpo"),
        ("accelerate launch -m trl.scripts.grpo --x 1", "trl", "trl.scripts.grpo"),
        ("torchrun train.py --reward_funcs a --max_completion_length 3", "trl", "train.py"),
        ("accelerate launch run_r1_grpo.py --config a.yaml", "trl", "run_r1_grpo.py"),
        ("trl grpo --model_name_or_path <your model> --beta 1", "trl", "trl grpo"),
        (f"{OPEN_R1} --config_x 1 --config a.yaml", "open-r1", "src/open_r1/grpo.py"),
        ("torchrun --nproc_per_node=8 src/open_r1/grpo.py --max_pixels 4", "r1-v", "src/open_r1/grpo.py"),
        ("torchrun src/open_r1/grpo_jsonl.py --x 1", "vlm-r1", "src/open_r1/grpo_jsonl.py"),
        ("torchrun src/open_r1/grpo_gui_lisa.py --max_pixels 4", "r1-v", "src/open_r1/grpo_gui_lisa.py"),
        ("torchrun src/open_r1/grpo.py --image_folders x", "vlm-r1", "src/open_r1/grpo.py"),
        ('srun bash -c "trl grpo --model_name_or_path <your model> --beta 1"', "trl", "trl grpo"),
        ("srun bash -c 'python3 -m verl.trainer.main_ppo a.b=1'", "verl", "verl.trainer.main_ppo"),
    ],
)
def test_a_command_tells_its_framework(tmp_path: Path, text: str, framework: str, program: str) -> None:
    read = source(tmp_path, "run.sh", text)
    assert (read.framework, read.program) == (framework, program)


@pytest.mark.parametrize(
    ("text", "framework"),
    [
        ("actor_rollout_ref:\n  rollout: {n: 5}\n", "verl"),
        ("data: {a: 1}\nworker:\n  actor: {global_batch_size: 8}\n", "easyr1"),
        ("rlhf_type: grpo\nmodel: a/b\n", "ms-swift"),
        ("model_name_or_path: a/b\nnum_generations: 8\n", "trl"),
        ("model_name_or_path: a/b\nnum_generations: 8\nsystem_prompt: x\n", "open-r1"),
        ("data_file_paths: x\nnum_generations: 8\n", "vlm-r1"),
        ('{"zero_optimization": {"stage": 2}}', "deepspeed"),
        ("compute_environment: LOCAL_MACHINE\nnum_processes: 8\n", "accelerate"),
    ],
)
def test_keys_tell_their_framework(tmp_path: Path, text: str, framework: str) -> None:
    assert source(tmp_path, "run.yaml", text).framework == framework


BAD = [
    ("run.sh", "echo hello\n", "no command that trains"),
    ("run.sh", "swift sft --model x\n", r"no GRPO training .* it starts swift sft \(line 1\)"),
    ("run.sh", "# python3 -m verl.trainer.main_ppo a.b=1\n", "no command that trains"),
    ("run.sh", f"{OPEN_R1} --beta 0\n", "does not tell which. Name one with --from"),
    ("run.sh", "python3 -m verl.trainer.main_ppo a.b=1\nswift rlhf --x 1\n", r"lines 1 \(verl\), 2 \(ms-swift\)"),
    ("run.sh", "python3 -m verl.trainer.main_ppo a=1\npython3 -m verl.trainer.main_ppo a=2\n", "2 commands that train"),
    ("run.sh", "python3 -m openrlhf.cli.train_ppo_ray --x 1\n", "OpenRLHF, which is not read yet"),
    ("run.sh", "uv run examples/run_grpo_math.py --config x.yaml grpo.x=1\n", "NeMo-RL, which is not read yet"),
    ("run.sh", "uv run rl @ a.toml\n", "prime-rl, which is not read yet"),
    ("run.sh", "llamafactory-cli train a.yaml\n", "LLaMA-Factory, which has no GRPO"),
    ("run.yaml", "stage: ppo\nmodel_name_or_path: x\n", "LLaMA-Factory, which has no GRPO"),
    ("run.yaml", "grpo: {a: 1}\npolicy: {b: 1}\nloss_fn: {c: 1}\n", "NeMo-RL, which is not read yet"),
    ("run.toml", "[orchestrator]\nbatch_size = 1\n", "prime-rl, which is not read yet"),
    ("run.yaml", "name: x\n", "no framework's GRPO configuration"),
    ("run.yaml", "rlhf_type: grpo\nactor_rollout_ref: {a: 1}\n", "keys of verl and of ms-swift"),
    ("run.yaml", "a: [\n", "cannot be read"),
    ("run.py", "print(1)\n", "makes no GRPOConfig"),
    ("run.ipynb", "{}", "no notebook"),
    ("run.sh", "", "the file is empty"),
    ("run.sh", "  \n\n", "the file is empty"),
    ("run.sh", "\x7fELF\0\0\0", "no text, but a program or data"),
    ("run.log", "x" * 2_000_001, "too long for a script"),
]


@pytest.mark.parametrize(("name", "text", "words"), BAD)
def test_what_is_none_is_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        source(tmp_path, name, text)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "this is a folder"), (tmp_path / "none.sh", "No such file")):
        with pytest.raises(ConfigError, match=words):
            read_source(path)
    with pytest.raises(ConfigError, match="no framework 'x'"):
        source(tmp_path, "a.sh", "x", "x")
    with (tmp_path / "huge.sh").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ConfigError, match="more than 20 MB"):
        read_source(tmp_path / "huge.sh")


def test_from_decides(tmp_path: Path) -> None:
    assert source(tmp_path, "run.sh", f"{OPEN_R1} --beta 0\n", "vlm-r1").framework == "vlm-r1"
    two = "python3 -m verl.trainer.main_ppo a.b=1\nswift rlhf --x 1\n"
    assert source(tmp_path, "run.sh", two, "ms-swift").settings == {"x": Setting(1, 2)}


def test_settings_of_a_script_over_those_of_its_yaml(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "examples" / "config.yaml").write_text("data:\n  a: 1\n  b: 2\nworker:\n  actor: {c: '${data.b}'}\n")
    text = "B=${B:-5}\npython3 -m verl.trainer.main \\\n  config=examples/config.yaml data.b=$B x=$LOST\n"
    read = source(tmp_path / "scripts", "run.sh", text, B="6")
    assert read.settings == {
        "data.a": Setting(1, 2, "config.yaml"), "data.b": Setting(6, 3, text="$B"),
        "worker.actor.c": Setting(6, 5, "config.yaml", "${data.b}"), "config": Setting("examples/config.yaml", 3),
        "x": Setting("$LOST", 3),
    }  # fmt: skip
    assert read.warnings == ("line 3: LOST is set nowhere; give it with --env LOST=VALUE",)
    (tmp_path / "examples" / "config.yaml").unlink()
    read = source(tmp_path / "scripts", "run.sh", text)
    assert "is not beside" in read.warnings[0]


def test_a_here_document_is_the_yaml_that_a_command_names(tmp_path: Path) -> None:
    text = "cat > /tmp/grpo.yaml <<EOF\nbeta: 0.1\nlr: $((1 + 1))\nEOF\ntrl grpo --config /tmp/grpo.yaml --beta 0.2\n"
    settings = source(tmp_path, "run.sh", text).settings
    assert settings["beta"].value == 0.2 and settings["lr"] == Setting(2, 2, "grpo.yaml")


def test_launch_environment_and_pins(tmp_path: Path) -> None:
    text = (
        "pip install trl==0.22.2\nexport A=1\nenv B=2 C=3 accelerate launch --config_file z.yaml \\\n"
        "  --num_processes 4 -m trl.scripts.grpo --bf16\n"
    )
    read = source(tmp_path, "run.sh", text)
    assert {name: setting.value for name, setting in read.launch.items()} == {
        "config_file": "z.yaml",
        "num_processes": 4,
    }
    assert {name: setting.value for name, setting in read.environment.items()} == {"A": "1", "B": "2", "C": "3"}
    assert read.hints == {"trl": "0.22.2"} and read.settings == {"bf16": Setting(True, 4)}


def test_a_secret_is_in_no_part(tmp_path: Path) -> None:
    text = "export WANDB_API_KEY=abc123secret\npython3 -m verl.trainer.main_ppo a.b=1 +x.api_key=abc123secret $abc\n"
    assert "abc123secret" not in repr(source(tmp_path, "run.sh", text))


def test_a_loop_over_one_command(tmp_path: Path) -> None:
    read = source(tmp_path, "run.sh", "for n in 4 8; do\n python3 -m verl.trainer.main_ppo n=$n\ndone\n")
    assert read.settings["n"].value == 4 and read.warnings == ("line 2 trains 2 times; the first is read",)


def test_a_loop_without_end(tmp_path: Path) -> None:
    text = "while true; do\n trl grpo --beta 1\n sleep 5\ndone\n"
    assert source(tmp_path, "run.sh", text).settings == {"beta": Setting(1, 2)}


def test_a_script_of_many_programs_is_one_short_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"e\.py \(line 5\) and 2 more"):
        source(tmp_path, "run.sh", "".join(f"python3 {name}.py\n" for name in "abcdefg"))


def test_hydra_names_a_yaml_beside(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - ppo_trainer\n  - _self_\nactor_rollout_ref: {rollout: {n: 4}}\n"
    )
    command = f"python3 -m verl.trainer.main_ppo --config-path {tmp_path} --config-name mine a.b=1\n"
    settings = source(tmp_path, "run.sh", command).settings
    assert settings["actor_rollout_ref.rollout.n"].value == 4 and settings["a.b"].value == 1


def test_a_python_script(tmp_path: Path) -> None:
    text = (
        "from unsloth import FastLanguageModel\nfrom trl import GRPOConfig\n"
        'FastLanguageModel.get_peft_model(model, r=8)\nload_dataset("a")\nload_dataset("b", split="x")\n'
        "GRPOConfig(beta=1)\nGRPOConfig(beta=0.5)\nimage.resize((512, 512))\n"
    )
    read = source(tmp_path, "train.py", text)
    assert read.framework == "unsloth" and {name: setting.value for name, setting in read.settings.items()} == {
        "FastLanguageModel.get_peft_model.r": 8, "load_dataset.0": "a", "load_dataset(2).0": "b",
        "load_dataset(2).split": "x", "beta": 0.5, "resize.0": [512, 512],
    }  # fmt: skip
    assert "2 GRPOConfig calls" in read.warnings[0]
    assert source(tmp_path, "train.py", "from trl import GRPOConfig\nGRPOConfig()\n").framework == "trl"


def test_a_command_in_a_docstring(tmp_path: Path) -> None:
    command = "accelerate launch \\\n    x/grpo_vlm.py \\\n    --num_generations 4\n"
    text = f'# a\n"""\nStart it:\n\n{command}\nOr:\npython y.py\n"""\nimport trl\n'
    read = source(tmp_path, "grpo_vlm.py", text)
    assert read.framework == "trl" and read.settings == {"num_generations": Setting(4, 7)}
    assert read.warnings == ("its docstring has 2 commands: the first is read",)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_has_a_module(tmp_path: Path, framework: str) -> None:
    (tmp_path / "run.yaml").write_text("name: x\n")
    with suppress(ConfigError):
        import_file(tmp_path / "run.yaml", framework=framework)


@pytest.mark.slow
def test_reading_takes_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("python3 -m verl.trainer.main_ppo a.b=1\n")
    code = (
        "import sys; from pathlib import Path; from grpo_autotune.interop import importing\n"
        "importing.read_source(Path(sys.argv[1])); print(*sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.sh")], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "trl", "vllm", "datasets", "optuna", "numpy"} & set(done.stdout.split())


def test_import_of_a_file_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        import_file(tmp_path / "none.sh")


QUOTES = """# it isn't one
cat <<EOF > c.yaml
system_prompt: "First <think> then answer"
EOF
trl grpo --model_name_or_path <your model> --config c.yaml --run_name 'in <think> and <answer> tags' \\
    --other "in <think> tags" --output_dir <out/dir> --beta 1 <in.txt 2> err.log
"""
SHIFTED = "N=3\nB=$((1 << N))\n((B = (B << N) * 2))\ntrl grpo --model_name_or_path <your model> --seed $B\n"


def test_a_placeholder_is_a_word_and_quotes_stay_as_they_are(tmp_path: Path) -> None:
    settings = {key: one.value for key, one in source(tmp_path, "run.sh", QUOTES).settings.items()}
    assert settings == {
        "model_name_or_path": "<your model>", "config": "c.yaml", "run_name": "in <think> and <answer> tags",
        "other": "in <think> tags", "output_dir": "<out/dir>", "beta": 1, "system_prompt": "First <think> then answer",
    }  # fmt: skip
    shifted = source(tmp_path, "run.sh", SHIFTED).settings
    assert (shifted["model_name_or_path"].value, shifted["seed"].value) == ("<your model>", 8)
