"""The pages: generated parts are current; commands, paths, links, YAML and Python in them are those of the code."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import typer.main
import yaml

from grpo_autotune.cli.main import app, main
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.config.sources import profile_names
from grpo_autotune.registry import Kind, names, resolve
from tests.support.tuned import tuned_values
from tools.architecture import floors, needed_arrows, room_imports, tree
from tools.pages import FILES, PARTS, with_parts

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FOLDERS = (
    "grpo_autotune",
    "benchmarks",
    "docs",
    "examples",
    "profiles",
    "tests",
    "tests_scale",
    "tests_vllm",
    "tools",
    ".ci",
)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PROGRAM, MODULE = "grpo-autotune", ["-m", "grpo_autotune"]
LEFT_ALONE = {"cd", "mkdir", "source", "vllm"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def blocks(language: str, page: Path | None = None) -> list[Block]:
    pages = PAGES if page is None else [page]
    return [
        Block(path, match[2], textwrap.dedent(match[3]))
        for path in pages
        for match in FENCE.finditer(path.read_text())
        if match[2] == language
    ]


def name_of(block: Block) -> str:
    number = blocks(block.language, block.page).index(block)
    return f"{block.page.relative_to(ROOT)}-{number}"


def shell_lines(text: str) -> Iterator[list[str]]:
    """The words of each command; comments and line continuations are taken out, and variables before a command."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def inline_code(page: Path) -> Iterator[str]:
    """What stands between single back-ticks, outside fenced blocks."""
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", page.read_text())):
        yield " ".join(match[1].split())


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def files_made_by(page: Path) -> set[str]:
    """Files that a page has the reader write: a block begins with their name, or a command of the page writes them."""
    named = set(re.findall(r"^ *```\w+\n *# (\S+\.\w+)", page.read_text(), re.MULTILINE))
    return named | {"my.yaml", "grpo.yaml", "tuned.yaml", "train.py", "train_grpo.py", "my_rewards.py"}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.page}: {part.name}")
def test_generated_parts_are_current(part: Any) -> None:
    text, wanted = (ROOT / part.page).read_text(), part.text()
    assert text.split(part.begin)[1].split(part.end)[0] == wanted, "bring it up to date: make docs"
    assert wanted.count("\n") > 5 and with_parts(part.page, text) == text


@pytest.mark.parametrize("name", FILES)
def test_generated_files_are_current(name: str) -> None:
    assert (ROOT / name).read_text() == FILES[name](), "bring it up to date: make docs"


def test_rooms_stand_above_what_they_import_and_arrows_that_follow_are_left_out() -> None:
    imports = {"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set(), "beside": {"ground"}}
    assert floors(imports) == [["ground"], ["beside", "middle"], ["top"]]
    assert needed_arrows(imports) == {("top", "middle"), ("middle", "ground"), ("beside", "ground")}
    with pytest.raises(ValueError, match=r"import each other: \['one', 'two'\]"):
        floors({"one": {"two"}, "two": {"one"}})


def test_the_picture_shows_every_room_and_no_box_covers_another() -> None:
    root = ElementTree.fromstring((ROOT / "docs" / "rooms.svg").read_text())
    svg = "{http://www.w3.org/2000/svg}"
    assert {text.text for text in root.iter(f"{svg}text")} == set(room_imports())
    boxes = [group.find(f"{svg}rect") for group in root.iter(f"{svg}g")]
    spans = sorted((float(box.get("y")), float(box.get("x")), float(box.get("width"))) for box in boxes)
    assert all(x + width < next_x for (y, x, width), (next_y, next_x, _) in pairwise(spans) if y == next_y)


@pytest.mark.parametrize("block", blocks("bash"), ids=name_of)
def test_shell_commands_are_those_of_the_code(block: Block) -> None:
    for words in shell_lines(block.text):
        check_command(words, block.page)


def check_command(words: list[str], page: Path) -> None:
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    for launcher in ("torchrun", "accelerate", "python"):
        if program == launcher and any(rest[at : at + 2] == MODULE for at in range(len(rest))):
            program, rest = PROGRAM, rest[rest.index("grpo_autotune") + 1 :]
    if program == PROGRAM:
        check_own_command(rest, page)
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= make_targets(), words
    elif program == "python" and rest[0] == "-m":
        assert module_exists(rest[1]), words
    elif program == "python":
        assert (ROOT / rest[0]).exists() or rest[0] in files_made_by(page), words
    elif program == "pip":
        check_extras(" ".join(rest))
    else:
        assert program in LEFT_ALONE or (ROOT / program).exists(), words


def check_own_command(words: list[str], page: Path) -> None:
    """Parse as the command line does, run nothing; a profile that is named is loaded with what `--set` says."""
    if words[0] == "--help":
        return
    command = COMMANDS[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    source = context.params.get("config")
    if source in profile_names():
        load_config(source, list(context.params.get("set_") or []))
    elif source is not None:
        shipped = source.startswith("examples/") and (ROOT / source).is_file()
        assert shipped or source in files_made_by(page) or source.startswith("runs/"), words
    if "run_dir" in context.params and words[0] == "report" and str(context.params["run_dir"]).startswith("docs/"):
        assert (ROOT / context.params["run_dir"] / "report.json").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_slurm_scripts_call_commands_that_there_are(path: Path) -> None:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    called = [match[1] for line in lines if (match := re.search(r"\b(?:srun|exec) .*grpo[-_]autotune ([^']+)", line))]
    assert called
    for words in map(shlex.split, called):
        own = [word for word in words[1:] if word != "&" and not word.startswith("${server")]
        assert COMMANDS[words[0]].make_context(words[0], own)


def check_extras(words: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for listed in re.findall(r"(?:\.|grpo-autotune)\[([\w,-]+)\]", words):
        assert set(listed.split(",")) <= set(extras), words


def module_exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_the_text_are_those_of_the_code(page: Path) -> None:
    """Between back-ticks: commands and their options, make targets, modules to run, extras, and files."""
    for code in inline_code(page):
        words = code.split()
        if words[0] == PROGRAM and len(words) > 1 and not words[1].startswith(("-", "COMMAND")):
            options = {name for option in COMMANDS[words[1]].params for name in option.opts}
            asked = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert asked <= {*options, "--help"}, code
        elif words[0] == "make" and len(words) > 1:
            assert set(words[1:]) <= make_targets(), code
        elif words[:2] == ["python", "-m"]:
            assert module_exists(words[2]), code
        elif words[0] == "pip":
            check_extras(code)
        elif re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w.*/-]*", code):
            assert list(ROOT.glob(code.rstrip("/"))), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", blocks("yaml"), ids=name_of)
def test_yaml_loads(block: Block, tmp_path: Path) -> None:
    """A whole configuration as it is; some sections in place of the demo's; each name of a registry."""
    given = yaml.safe_load(block.text)
    if block.text.startswith("# datasets.yaml"):
        (tmp_path / "datasets.yaml").write_text(block.text)
        for name in given:
            data = json.dumps({"path": name, "registry": str(tmp_path / "datasets.yaml")})
            assert load_config("demo", [f"data={data}"]).data.path in (name, given[name].get("path"))
        return
    if not {"model", "data", "rewards"} <= set(given):
        whole = yaml.safe_load((ROOT / "profiles" / "demo.yaml").read_text())
        for section, values in given.items():
            mixed = isinstance(values, dict) and isinstance(whole.get(section), dict)
            whole[section] = whole[section] | values if mixed else values
        text = json.dumps(whole)
    else:
        text = block.text
    (tmp_path / "page.yaml").write_text(text)
    assert isinstance(load_config(str(tmp_path / "page.yaml")), RunConfig)


@pytest.mark.parametrize("block", blocks("python"), ids=name_of)
def test_python_compiles_and_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "grpo_autotune":
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize(("page", "kind"), [("rewards.md", "reward"), ("speedups.md", "speedup")])
def test_every_registered_name_has_a_row(page: str, kind: Kind) -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE))
    assert set(names(kind)) <= rows


@pytest.mark.parametrize("words", [["--help"], ["doctor"], ["report", "docs/benchmarks/demo"]], ids=" ".join)
def test_cheap_commands_run(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) in ((0, 3) if words == ["doctor"] else (0,))  # 3: it found something that stops training
    assert len(capfd.readouterr().out) > 200


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_every_benchmark_is_on_its_page_with_its_command(path: Path) -> None:
    row = next(
        line
        for line in (ROOT / "docs" / "benchmarks" / "README.md").read_text().splitlines()
        if line.startswith(f"| `{path.name}`")
    )
    assert f"`{json.loads(path.read_text())['command']}`" in row


def test_quoted_messages_are_those_of_the_code() -> None:
    """In the first column of the troubleshooting page; `...` stands for what a message fills in."""
    literals = "\n".join(
        node.value
        for path in (ROOT / "grpo_autotune").rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    symptoms = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [code for symptom in symptoms for code in re.findall(r"`([^`]+)`", symptom)]
    fragments = [part.strip(" ,") for code in quoted for part in code.split("...")]
    assert len(fragments) > 10
    assert not [text for text in fragments if " " in text and text not in literals]


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader of the tutorial has: its files written, its data made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    tutorial = ROOT / "docs" / "tutorial.md"
    for block in [*blocks("python", tutorial), *blocks("yaml", tutorial)]:
        match = re.match(r"# (\S+\.\w+)\n", block.text)
        if match is not None:
            (tmp_path / match[1]).write_text(block.text)
    exec(compile((tmp_path / "make_data.py").read_text(), "make_data.py", "exec"), {})
    return tmp_path


def test_the_tutorials_own_data_and_reward_can_be_used(own_data: Path) -> None:
    from grpo_autotune.train.data.datasets import load_data

    config = load_config(str(own_data / "my.yaml"))
    train, held_out = load_data(config, lambda line: None)
    assert held_out is not None and len(train) == 192 and len(held_out) == 48
    assert train[0]["answer"] == 0 and "image" in "".join(train[0])
    near = resolve("reward", config.rewards[1].name)
    said = [[{"role": "assistant", "content": text}] for text in ("<answer>7</answer>", "It is 4.", "none")]
    assert near(completions=said, answer=[7, 7, 7]) == pytest.approx([1.0, 2 / 3, 0.0])


def test_the_tutorials_configuration_trains(own_data: Path, tiny: Any) -> None:
    """With a tiny model in the demo's place, which takes a minute to make."""
    short = [f"model.name_or_path={tiny('qwen3_vl')}", "grpo.max_steps=2", "grpo.eval_steps=2"]
    assert main(["train", "my.yaml", *(word for item in short for word in ("--set", item))]) == 0
    lines = (own_data / "runs" / "my" / "train_log.jsonl").read_text().splitlines()
    assert any("rewards/near/mean" in line for line in lines)


def test_the_walks_with_other_frameworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The commands of the page that train nothing, on its files; a tuned file stands in for the search's."""
    shutil.copytree(ROOT / "examples" / "interop", tmp_path / "examples" / "interop")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "interop.md"
    commands = [words for block in blocks("bash", page) for words in shell_lines(block.text)]
    ran = [words[1:] for words in commands if words[:2] in ([PROGRAM, "import"], [PROGRAM, "export"])]
    ran = [words for words in ran if any(word.startswith("examples/") for word in words)]
    assert [words[0] for words in ran].count("import") == 3
    for words in ran:
        if words[0] == "export":
            config = RunConfig.from_yaml((tmp_path / "grpo.yaml").read_text()).to_dict()
            tuned = tuned_values(config, {"grpo.num_generations": 4, "grpo.gradient_checkpointing": False})
            (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tuned))
        assert main(words) == 0, words
        assert len(capfd.readouterr().out) > 500 or words[0] == "export"
    text = (tmp_path / "run_tuned.sh").read_text()
    assert "GROUP=${GROUP:-4}" in text and "BATCH=${BATCH:-32} " in text and "ppo_mini_batch_size=16\n" in text
    assert "not-a-real-key" not in (tmp_path / "grpo.yaml").read_text()
