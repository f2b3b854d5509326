"""Python scripts and notebooks: arguments of calls with their lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading import python_source
from grpo_autotune.interop.source import Setting

SCRIPT = '''"""Docs."""
import os
from trl import GRPOConfig, GRPOTrainer
P, total = 256, 1024
total += 1
total = 1024
n = 2 * 4 - 1
name = f"run-{n}"
common = dict(lr=1e-5, n=n)
os.environ["MAX_PIXELS"] = "100"
args = GRPOConfig(
    "out",
    beta=0.0,
    max_completion_length=total - P if P else 1,
    warmup=total - n,
    run_name=name,
    path=os.environ.get("OUT", "here"),
    secret=os.environ["X"],
    **common,
)
args.epochs = n
trainer = GRPOTrainer(model, args=args, reward_funcs=[right, "accuracy", lambda x: 1], spec=f"{n:03d}")
'''


def test_arguments_with_values_lines_and_source(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    script = python_source.read(file, {"OUT": "there"})
    (config,) = script.called("GRPOConfig")
    assert config.arguments == {
        "0": Setting("out", 12), "beta": Setting(0.0, 13),
        "max_completion_length": Setting(768, 14, text="total - P if P else 1"),
        "warmup": Setting(1017, 15, text="total - n"), "run_name": Setting("run-7", 16, text="name"),
        "path": Setting("there", 17, text="os.environ.get('OUT', 'here')"),
        "secret": Setting("os.environ['X']", 18, text="os.environ['X']"),
        "lr": Setting(1e-5, 11), "n": Setting(7, 11), "epochs": Setting(7, 21, text="n"),
    }  # fmt: skip
    (trainer,) = script.called("GRPOTrainer")
    assert trainer.arguments["reward_funcs"].value == ["right", "accuracy", "lambda x: 1"]
    assert trainer.arguments["spec"].value == "f'{n:03d}'"
    assert script.imports == {"os", "trl"} and script.environment == {"MAX_PIXELS": Setting("100", 10)}
    assert script.docstring == range(1, 2)


def test_what_is_not_known_is_no_plain_text_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text("x = f()\ny = x\nGRPOConfig(a=y, b=[x, 1], c={'k': x}, d='z' * 10**9)\n")
    values = {name: setting.value for name, setting in python_source.read(file).calls[-1].arguments.items()}
    assert values == {"a": "y", "b": ["x", 1], "c": {"k": "x"}, "d": "'z' * 10 ** 9"}
    assert all(type(value) in (str, list, dict) for value in values.values())


def test_a_name_of_several_values_is_not_known(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "n, m, k, d = 8, 4, 2, {'a': 1}\nif fast():\n    n, d['a'] = 2, 3\nif False:\n    m = 5\nk *= 2\nd['b'] = 2\n"
        "def main(m):\n    GRPOConfig(m=m)\nfor i in x:\n    GRPOConfig(i=i)\n"
        "a, b, c = 1, 1, 1\ntry:\n    a = 2\n    GRPOConfig(a=a)\nexcept ImportError:\n    a = 3\n"
        "for i in x:\n    GRPOConfig(b=b)\n    b += 1\nwhile f():\n    c = 2\nGRPOConfig(a=a, b=b, c=c)\n"
        "GRPOConfig(n=n, m=m, k=k, **d)\nd.update(c=3)\nGRPOConfig(**d)\n"
    )
    values = [
        {name: s.value for name, s in call.arguments.items()} for call in python_source.read(file).called("GRPO.*")
    ]
    assert values[2:5] == [{"a": 2}, {"b": "b"}, {"a": "a", "b": "b", "c": "c"}]
    assert values[:2] + values[5:] == [{"m": "m"}, {"i": "i"}, {"n": "n", "m": 4, "k": 4, "**d": "d"}, {"**d": "d"}]


OPTIONS = """
import argparse
def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("-b", "--batch-size", type=int, default=4)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--folder", default=os.getcwd())
    return parser.parse_args()
def main(args):
    GRPOConfig(m=args.model, b=args.batch_size * 2, t=args.tune, f=args.folder, o=other.batch_size)
args = parsed()
GRPOConfig(b=args.batch_size)
"""


def test_options_of_a_command_are_at_their_defaults(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(OPTIONS)
    for given, batch in (({}, 4), ({"batch_size": "16"}, 16)):
        script = python_source.read(file, given)
        config, last = script.called("GRPOConfig")
        assert [setting.value for setting in config.arguments.values()] == [
            "args.model", 2 * batch, False, "args.folder", "other.batch_size",
        ]  # fmt: skip
        assert last.arguments["b"].value == batch
        usual = "" if given else "batch_size 4, "
        assert script.warnings == [
            f"options of its command are taken at their defaults (--env NAME=VALUE): {usual}tune False"
        ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n or 2", 4), ("None or n", 4), ("n and 0", 0), ("f() or 2", "f() or 2"), ("n if n > 3 else 1", 4),
        ("1 if f() else n", "1 if f() else n"), ("False if kind == 'none' else True", False), ("n is not None", True),
        ("[f()] == [4]", "[f()] == [4]"), ("f'{[f()]}'", "f'{[f()]}'"), ("kind in ('a', 'none')", True),
        ("1 < n < 5", "1 < n < 5"), ("n < 'a'", "n < 'a'"),
    ],
)  # fmt: skip
def test_a_condition_that_is_known(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "train.py").write_text(f"n, kind = 4, 'none'\nGRPOConfig(x={text})\n")
    (call,) = python_source.read(tmp_path / "train.py").called("GRPOConfig")
    assert call.arguments["x"].value == value


def test_arguments_of_an_object_and_a_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "made = ModelConfig(model_name_or_path='m', x=f())\nmodel, tokenizer = load(made.model_name_or_path)\n"
        "text = 'a{b}' + made.model_name_or_path\ntext = text.replace('{b}', 'c')\ntokenizer.chat_template = text\n"
        "GRPOTrainer(model=made.model_name_or_path, x=made.x, y=made.y)\n"
    )
    script = python_source.read(file)
    (trainer,) = script.called("GRPOTrainer")
    assert [setting.value for setting in trainer.arguments.values()] == ["m", "made.x", "made.y"]
    assert script.called("chat_template")[0].arguments == {"chat_template": Setting("acm", 5, text="text")}


def test_an_attribute_that_may_have_been_set_is_not_known(tmp_path: Path) -> None:
    """Of the object of a call, of argparse's and of a parameter with its name; the object itself is still known."""
    head = "cfg = GRPOConfig(beta=0.0, top_k=5)\nargs = p.parse_args()\np.add_argument('--lr', default=1)\n"
    body = "if f():\n    cfg.beta, args.lr = 0.5, 9\ncfg.seed = 1\nG(cfg.beta, args.lr, cfg.top_k, cfg.seed)\n"
    main = "def main(args):\n    if f():\n        args.lr = 9\n    G(args.lr)\n    args.lr = None\n    G(args.lr)\n"
    (tmp_path / "train.py").write_text(head + body + main)
    for given, lr in (({}, "args.lr"), ({"lr": "3"}, 3)):
        script = python_source.read(tmp_path / "train.py", given)
        values = [[s.value for s in call.arguments.values()] for call in script.called("G")]
        assert values == [["cfg.beta", lr, 5, 1], [lr], [None]] and not script.usual
        beta = script.called("GRPOConfig")[0].arguments["beta"]
        assert beta.value == beta.text == "cfg.beta"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("if t.chat_template is None:\n    t.chat_template = 'b'\n", ["a", "b", "t.chat_template"]),
        ("class Rows:\n    def __init__(self, chat_template):\n        self.chat_template = chat_template\n", ["a"]),
    ],
)
def test_a_chat_template_that_counts(tmp_path: Path, text: str, values: list[str]) -> None:
    """The last of them: inside of a condition only a run can tell, and a class has its own."""
    (tmp_path / "train.py").write_text(f"t.chat_template = 'a'\n{text}")
    calls = python_source.read(tmp_path / "train.py").called("chat_template")
    assert [call.arguments["chat_template"].value for call in calls] == values


@pytest.mark.parametrize("text", ["d[0, 1] = 2", "d[f()] = 2", "d = os.getenv(key='X')", "d = str(b'x', 'nope')"])
def test_a_key_and_arguments_that_nobody_can_use(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.py").write_text(f"d = {{}}\n{text}\nGRPOConfig(x=d)\n")
    (call,) = python_source.read(tmp_path / "train.py").called("GRPOConfig")
    assert call.arguments["x"].value == "d"


def test_a_notebook_by_cells(tmp_path: Path) -> None:
    sources = [
        ["%%bash\n", "pip install nothing\n"],
        ["!pip install unsloth \\\n", "    trl==0.22.2\n", "if True:\n", "    !pip install x\n", "n = 4"],
        ["%time\n", "c = GRPOConfig(num_generations=n)"],
        ["x = 'a\n", "d = GRPOConfig(num_generations=2)\n"],
    ]
    cells = [{"cell_type": "code", "source": source} for source in sources]
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# a"]}, *cells]}))
    script = python_source.read(file)
    assert [call.arguments["num_generations"] for call in script.called("GRPOConfig")] == [
        Setting(4, 2, "cell 4", "n"), Setting(2, 2, "cell 5"),
    ]  # fmt: skip
    assert script.pins == {"trl": "0.22.2"}
    assert script.warnings == ["cell 5, lines 1 to 1 are not read: no Python"]


@pytest.mark.parametrize(("name", "text"), [("a.py", "((((\n" * 30), ("a.ipynb", "{}"), ("a.ipynb", "x")])
def test_what_is_no_python_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"no Python|no notebook"):
        python_source.read(tmp_path / name)


def test_the_environment_gives_a_name_that_is_left_open(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("N = f()\nGRPOConfig(n=N, m=N * 2, k=OPEN, s=TEXT)\n")
    arguments = python_source.read(file, {"N": "4", "OPEN": "1e-3", "TEXT": "a/b"}).calls[-1].arguments
    assert {name: setting.value for name, setting in arguments.items()} == {"n": 4, "m": 8, "k": 1e-3, "s": "a/b"}


TYPED = """
p.add_argument("--lr", type=float, default="1e-5")
p.add_argument("--n", type=int, default=4)
p.add_argument("--k", type=kind, default="4")
p.add_argument("--bad", type=int, default="four")
p.add_argument("--beta", type=float, default=0.1)
p.add_argument("--seed", type=int, default=1)
p.add_argument(**spec)
p.add_argument("--spread", **spec)
p.set_defaults(beta=0.2, seed=f())
GRPOConfig(args.lr, args.n, args.k, args.bad, args.beta, args.seed, args.spread)
"""


def test_defaults_as_argparse_gives_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TYPED)
    (config,) = python_source.read(tmp_path / "train.py").called("GRPOConfig")
    assert [setting.value for setting in config.arguments.values()] == [
        1e-5, 4, "args.k", "args.bad", 0.2, "args.seed", "args.spread",
    ]  # fmt: skip


def test_defaults_are_said_shortly_and_without_secrets(tmp_path: Path) -> None:
    names = ["wandb_key", *(f"name_{place}" for place in range(9))]
    options = [f"p.add_argument('--{name}', default='local-{'abc' * 99}')" for name in names]
    used = ", ".join(f"{name}=args.{name}" for name in names)
    (tmp_path / "train.py").write_text("\n".join([*options, f"GRPOConfig({used})"]))
    (warning,) = python_source.read(tmp_path / "train.py").warnings
    assert "wandb_key ***, name_0 local-abc" in warning and warning.endswith(" and 5 more") and len(warning) <= 400


def test_a_value_that_grows_without_end_is_not_known(tmp_path: Path) -> None:
    grows = ["x = x.replace('a', 'aaaaaaaaaa')", "y = y + y", "n = n * n", "b = b + b"]
    wide = ["'%700000000d' % 1", "'%(a)s%0700000000d' % 1", "'%*d' % (700000000, 1)", "b'%700000000d' % 1"]
    first = "x = y = 'aaaaaaaaaa'\nn, b, m = 3, b'a', [1]\n"
    last = f"G(x, y, n, b, {', '.join(wide)})\nG(m, 'run-%d' % 4, 7 * 7 % 10)"
    (tmp_path / "train.py").write_text("\n".join([first, *grows * 60, *["m = [m, m]"] * 60, last]))
    one, other = python_source.read(tmp_path / "train.py").called("G")
    assert all(setting.value == setting.text and len(setting.text) < 30 for setting in one.arguments.values())
    nested, *values = [setting.value for setting in other.arguments.values()]
    assert len(str(nested)) < 1_000_000 and values == ["run-4", 9]
