"""Pages of a probe, a search and a training run: what is on them, and that no datum gets out of its place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import reduce
from html.parser import HTMLParser
from operator import getitem
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from pyarrow import parquet
from pydantic import ValidationError

from grpo_autotune.cli.main import main
from grpo_autotune.commands.page import keep_page, page_of, write_page
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.stages import stages_of
from grpo_autotune.records.probe import STAGES
from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.render import page
from grpo_autotune.render.page import datum, render_page
from grpo_autotune.render.pictures import STAGE_COLOURS
from grpo_autotune.render.probe_page import probe_sections, probe_title
from grpo_autotune.render.search_page import search_sections, search_title
from grpo_autotune.render.train_page import MOST_POINTS, evaluations, train_sections, train_title
from grpo_autotune.report.configuration import changed_keys, tuned_diff
from grpo_autotune.report.configuration import settings as setting_rows
from grpo_autotune.report.timeline import bars_of, read_spans
from grpo_autotune.units import seconds

ROOT = Path(__file__).parents[2]
DEMO = json.loads((ROOT / "docs" / "benchmarks" / "demo" / "report.json").read_text())
SEARCH = json.loads((ROOT / "tests" / "stored" / "search.json").read_text())
EVIL = (
    "</ScRiPt><script>alert(1)</script>", "\"' onload=alert(1) x='", "</style></title><img src=x onerror=alert(1)>",
    "\u2028\u2029\x00\x1b[31m", "\u202egnp.exe", "]]><!-- {{ 7*7 }} {% raw %}", "javascript:alert(1)", "\ud800",
    "/home/somebody/data/x.json", "hf_abcdefghijklmnopqrstuv", "<svg/onload=alert(1)>" * 50_000,
)  # fmt: skip
DRAWN = ("svg", "g", "path", "line", "text", "rect", "circle", "defs", "tspan", "title")
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "nav", "ul", "li", "a", "section"),
    *("div", "p", "ol", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details"),
    *("summary", "pre", "span", *DRAWN),
}
VOID = {"meta"}


class Reader(HTMLParser):
    """A reader that fails on tags that a page never has, on handlers, on links elsewhere, and on what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "style"), name
            assert name not in ("href", "xlink:href") or (value or "").startswith("#")
            self.ids += [value or ""] if name == "id" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def spans(step: int, scale: float = 1.0, name: str = "copy") -> dict[str, Any]:
    rows: list[list[Any]] = [["", "step", -1, 0.0, scale], ["generation", "generate", 0, 0.1 * scale, 0.5 * scale]]
    rows += [["prompt", name if n == 50 else "copy", 1, (0.2 + 0.0001 * n) * scale, 0.0001 * scale] for n in range(100)]
    rows.append(["backward", "", 0, 0.7 * scale, 0.2 * scale])
    return {"step": step, "spans": rows, "other_threads": [["reward", name, 7, 0.1 * scale, 0.3 * scale]]}


def probed(folder: Path, steps: int = 32) -> Path:
    numbers = list(range(2, 2 + steps))
    took = [0.5 + 0.01 * (number % 7) for number in numbers]
    stages = [{**row, "per_step_s": [row["share"] * s for s in took] if row["share"] else []} for row in DEMO["stages"]]
    (folder / "report.json").write_text(json.dumps({**DEMO, "steps": numbers, "step_seconds": took, "stages": stages}))
    lines = [json.dumps(spans(number, seconds)) for number, seconds in zip(numbers, took, strict=True)]
    (folder / "spans.jsonl").write_text("\n".join(["", *lines, '{"step": 3, "spans": [[', '{"step": 4, "spans": 5}\n']))
    (folder / "spans.rank1.jsonl").write_text(json.dumps(spans(2)) + "\n")
    return folder


def trained(folder: Path, steps: int = 40) -> Path:
    rows = [
        {
            "kind": "train",
            "step": n,
            "time": n,
            "step_s": 0.4,
            "reward": n / 100,
            "kl": None,
            "frac_reward_zero_std": 0.1,
        }
        for n in range(1, steps + 1)
    ]
    held_out = {"kind": "eval", "step": steps, "eval_reward": 0.5, "eval_reward_std": 0.4, "eval_hard_runtime": 2.0,
                "eval_hard_samples_per_second": 200.0}  # fmt: skip
    (folder / "train_log.jsonl").write_text("\n".join(map(json.dumps, [*rows, held_out])) + '\n{"kind": "tra')
    return folder


def test_the_page_of_a_probe_has_its_sections_in_order_and_is_small(tmp_path: Path) -> None:
    text = page_of(probed(tmp_path))
    read = Reader(text)
    order = [
        "summary",
        "step",
        "timeline",
        "steps",
        "advice",
        "stages",
        "stage-generation",
        "work",
        "startup",
        "machine",
    ]
    assert [name for name in read.ids if name in order] == order and len(read.ids) == len(set(read.ids))
    assert len(text.encode()) < 300_000
    best = next(advice for advice in DEMO["verdict"] if advice["kind"] == "exact")
    assert f"The best exact change, speedups auto, is predicted to save {seconds(best['predicted_saving'])} (" in text
    assert (
        "default-src &#39;none&#39;" not in text
        and "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    )
    assert "<script" not in text and 'http-equiv="refresh"' not in text
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", text)
    assert text.count('role="img"') == text.count("<details>") == text.count("<figure")
    assert "fastest, step 7, rank 0" in text and "fastest, step 7, rank 0, thread 2" in text
    assert "/root" not in text and str(Path.home()) not in text


def test_short_spans_are_merged_and_counted_and_all_time_is_kept(tmp_path: Path) -> None:
    step = read_spans(probed(tmp_path) / "spans.jsonl", {2})[2]
    bars = [bar for bar in bars_of(step, "main") if bar.lane == "main"]
    assert [(bar.stage, bar.spans) for bar in bars if bar.stage == "prompt"] == [("prompt", 100)]
    whole = step.spans[0].host_s
    assert sum(bar.seconds for bar in bars) == pytest.approx(whole) and len(bars) < 10
    told = stages_of(step).self_s
    for stage in ("generation", "prompt", "backward", "other"):
        assert sum(bar.seconds for bar in bars if bar.stage == stage) == pytest.approx(told[stage])


def test_a_probe_without_spans_has_no_timeline_but_its_steps(tmp_path: Path) -> None:
    for path in probed(tmp_path).glob("spans*"):
        path.unlink()
    read = Reader(page_of(tmp_path))
    assert "steps" in read.ids and "timeline" not in read.ids


def test_the_page_of_a_search_begins_with_the_race(tmp_path: Path) -> None:
    rows = [{**SEARCH["trials"][n % 2], "number": n} for n in range(200)]
    rows[5] |= {"status": "oom", "why": "CUDA out of memory", "step_s": None}
    (tmp_path / "search.json").write_text(json.dumps({**SEARCH, "trials": rows}))
    text = page_of(tmp_path)
    read = Reader(text)
    assert [name for name in read.ids if name in ("race", "trials", "models", "configurations")] == [
        "race", "trials", "models", "configurations"
    ]  # fmt: skip
    assert "CUDA out of memory" in text and "+speedups: auto" in text and "about 12 prompts would settle it" in text
    assert len(text.encode()) < 600_000 and "trial-199" in read.ids


def test_the_page_of_a_training_run(tmp_path: Path) -> None:
    text = page_of(trained(tmp_path), running=True)
    read = Reader(text)
    assert read.ids[:2] == ["summary", "summary-title"] and "evaluations" in read.ids and "curves" in read.ids
    assert 'http-equiv="refresh" content="60"' in text and "still running" in text
    assert 'http-equiv="refresh"' not in page_of(tmp_path)
    assert (
        "Reward on hard data 0.5 (0.461 to 0.539) at step 40, the highest of 1 evaluation." in text
    )  # 0.4 / sqrt(400) * 1.96


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    text = page_of(trained(tmp_path, 3000))
    assert len(text.encode()) < 600_000 and f"{MOST_POINTS} steps" not in text
    assert evaluations([{"kind": "eval", "step": 1, "eval_runtime": 1.0}]) == []


def test_every_stage_has_a_colour_of_its_own() -> None:
    assert tuple(STAGE_COLOURS) == STAGES and len(set(STAGE_COLOURS.values())) == len(STAGES)


@pytest.mark.slow
def test_the_script_of_an_interactive_page_is_allowed_by_its_hash_alone(tmp_path: Path) -> None:
    import base64
    import hashlib

    text = page_of(probed(tmp_path), interactive=True)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1 and text.count("<script") == 2
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "unsafe-eval" not in text
    data = re.findall(r'<script type="application/json" id="specs">(.*?)</script>', text, re.DOTALL)
    assert "<" not in data[0] and len(json.loads(data[0])) == text.count('id="picture-')


def test_no_keys_no_homes_no_passwords() -> None:
    assert datum("hf_abcdefghijklmnop at https://me:secret@host/x") == "(a key) at https://host/x"
    assert datum("/home/ann/a and /Users/bob/b, /root/c, C:\\Users\\eve\\d") == "~/a and ~/b, ~/c, ~\\d"
    assert datum("sk-learn is no key, nor /rooted/x") == "sk-learn is no key, nor /rooted/x"
    assert datum("a\x00b\u202ec\nd") == "a\\x00b\\u202ec d" and len(datum("x" * 10**6)) < 5000
    config = {
        **DEMO["config"],
        "grpo": {**DEMO["config"]["grpo"], "hub_token": "plainsecret", "max_completion_length": 12},
    }
    text = render_page("t", probe_sections(Report.model_validate({**DEMO, "config": config}), Path("nowhere")))
    assert "plainsecret" not in text and "(not shown)" in text
    assert datum("s3://AKIAABCDEFGHIJKL:word@host/x?token=abcdefgh&b=1") == "s3://host/x?token=(a key)&b=1"


def test_settings_of_a_run_of_several_processes_are_told_by_one() -> None:
    values = {**DEMO["config"], "grpo": {"per_device_train_batch_size": 4, "num_generations": 8}}
    assert ("grpo.num_generations", 8, "") not in setting_rows(values)
    assert "-  num_generations: 8" in tuned_diff(values, {"grpo.num_generations": 16})


def test_secrets_below_a_key_are_neither_shown_nor_compared_and_numbers_are() -> None:
    judge = {"name": "judge", "params": {"api_key": "plainsecret", "headers": {"Authorization": "Bearer plainsecret"}}}
    config = {"rewards": [judge], "grpo": {"push_to_hub_token": "plainsecret"}, "vllm": {"max_num_batched_tokens": 77}}
    shown = setting_rows(config)
    assert "plainsecret" not in str(shown) and ("vllm.max_num_batched_tokens", 77, "") in shown
    other = {**config, "grpo": {"push_to_hub_token": "plainsecret2"}, "vllm": {"max_num_batched_tokens": 78}}
    assert changed_keys(config, other) == {"vllm.max_num_batched_tokens": ["77", "78"]}
    user = {**DEMO["config"], "grpo": {"hub_token": "plainsecret", "num_generations": 8, **DEMO["config"]["grpo"]}}
    diff = str(tuned_diff(user, {"grpo.num_generations": 16}))
    assert "hub_token: (not shown)" in diff and "plainsecret" not in diff


@pytest.mark.parametrize("over", [False, True])
def test_a_training_that_was_resumed_and_killed_has_no_report_of_before(tmp_path: Path, over: bool) -> None:
    (trained(tmp_path) / "report.json").write_text(json.dumps(DEMO))
    LiveFile(tmp_path).write(step=40, of=80, over=over)
    text = page_of(tmp_path)
    assert ("without a report: it runs, or was killed" in text) != over and ('id="stages"' in text) == over


def test_what_may_not_be_read_is_one_line_and_is_left_out_of_a_table(tmp_path: Path, capsys) -> None:
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        probed(tmp_path / name)
    closed, user = str(tmp_path / "closed"), os.geteuid()
    assert main(["report", closed]) == main(["compare", closed, closed]) == main(["watch", closed, "--once"]) == 0
    Path(closed).chmod(0)
    try:
        if user == 0:  # whom no mode keeps out
            for folder in (tmp_path, *tmp_path.parents[:3]):
                folder.chmod(0o755)
            os.seteuid(65534)
        codes = [main([*words, closed]) for words in (["report"], ["report", "--html"], ["compare", closed])]
        capsys.readouterr()
        codes.append(main(["watch", str(tmp_path), "--once"]))
    finally:
        os.seteuid(user)
        Path(closed).chmod(0o755)
    assert codes == [2, 2, 2, 0] and "open" in capsys.readouterr().out


def test_a_training_whose_configuration_is_torn_has_a_page_without_it(tmp_path: Path) -> None:
    (trained(tmp_path) / "config.yaml").write_bytes(b"- no\n- mapping\n- \xff\n")
    assert "configuration" not in Reader(page_of(tmp_path)).ids


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Places of a document's leaves and dictionaries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*at, number))
    else:
        yield at, value


def at(document: Any, place: tuple[Any, ...]) -> Any:
    """The value at a place of a document."""
    return reduce(getitem, place, document)


def put(document: Any, place: tuple[Any, ...], value: Any) -> None:
    at(document, place[:-1])[place[-1]] = value


def spoilt(document: dict[str, Any], data: st.DataObject, schema: Any) -> Any:
    """The document with hostile texts and numbers in many places; those that its schema refuses stay as they were."""
    text = st.one_of(st.sampled_from(EVIL), st.text(max_size=30))
    number = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e308, -1.0, 5e-324]))
    places = [place for place, value in leaves(document) if isinstance(value, str | float)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=40, unique=True))
    copy = json.loads(json.dumps(document))
    for place in chosen:
        value = at(document, place)
        put(copy, place, data.draw(text if isinstance(value, str) else number))
    try:
        return schema.model_validate(copy)
    except ValidationError as refused:
        for error in refused.errors(include_input=False, include_context=False):
            place = tuple(error["loc"])
            put(copy, place, at(document, place))
        return schema.model_validate(copy)


def pages(data: st.DataObject, folder: Path) -> str:
    """A page of a spoilt probe, search or training run."""
    evil = st.sampled_from(EVIL)
    kind = data.draw(st.sampled_from(["probe", "search", "train"]))
    if kind == "search":
        report = spoilt({**SEARCH, "trials": SEARCH["trials"][:6]}, data, SearchReport)
        return render_page(search_title(report), search_sections(report))
    report = spoilt(DEMO, data, Report)
    if kind == "train":
        keys = st.one_of(evil, st.sampled_from(["reward", "kl", "eval_reward", "eval_x_runtime", "step_s"]))
        values = st.one_of(
            evil, st.floats(), st.none(), st.integers(), st.booleans(), st.lists(st.integers(), max_size=2)
        )
        row = st.fixed_dictionaries({"kind": st.sampled_from(["train", "eval"]), "step": st.integers(-5, 10**12)})
        log = [
            {**data.draw(st.dictionaries(keys, values, max_size=5)), **one}
            for one in data.draw(st.lists(row, min_size=1))
        ]
        return render_page(train_title(log, report, running=True), train_sections(log, report), refresh_s=9)
    lines = [spans(step, name=data.draw(evil)) for step in report.steps]
    lines[0]["spans"].append([data.draw(evil), data.draw(evil), data.draw(st.integers(-3, 200)), 0.0, 0.1])
    (folder / "spans.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return render_page(probe_title(report), probe_sections(report, folder))


def harmless(text: str) -> None:
    Reader(text)
    assert "\x00" not in text and "\u202e" not in text and "\u2028" not in text and "49 " not in datum("{{ 7*7 }}")
    assert "/home/somebody" not in text and "hf_abcdefgh" not in text
    text.encode()


# a failure is not made smaller: with tracing and megabytes of text that takes minutes
LENIENT: dict[str, Any] = {
    "phases": (Phase.generate,),
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}


@pytest.mark.slow
@settings(max_examples=2 * settings.default.max_examples // 5, **LENIENT)
@given(data=st.data())
def test_hostile_reports_stay_in_their_places(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Forty reports; 200 with `--hypothesis-profile=thorough`."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:  # drawn below, for some of them
        patch.setitem(page.ENVIRONMENT.filters, "svg", lambda spec: Markup("<svg></svg>"))
        harmless(pages(data, folder))


@pytest.mark.slow
@settings(max_examples=15, **LENIENT)
@given(data=st.data())
def test_hostile_texts_in_pictures(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    harmless(pages(data, tmp_path_factory.mktemp("hostile")))


def test_answers_are_on_the_page_only_where_they_are_asked_for_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_file = trained(tmp_path) / "report.html"
    assert main(["report", str(tmp_path), "--with-samples", "2"]) == 0
    assert "This run stored no answers" in page_file.read_text()
    folder = tmp_path / "checkpoints" / "completions"
    folder.mkdir(parents=True)
    asked = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]}]
    told = [[{"role": "assistant", "content": f"<b>answer {n}</b>"}] for n in range(3)]
    rows = {"step": [9] * 3, "prompt": [asked] * 3, "completion": told, "advantage": [0.5, 0.0, -0.5]}
    parquet.write_table(pyarrow.table(rows), folder / "completions_00009.parquet")
    parquet.write_table(pyarrow.table({"step": [8]}), folder / "completions_00008.parquet")
    (folder / "completions_00010.parquet").write_text("torn")
    assert main(["report", str(tmp_path), "--with-samples", "2"]) == 0
    text = page_file.read_text()
    assert "&lt;b&gt;answer 1&lt;/b&gt;" in text and "answer 2" not in text and ">How many?<" in text
    assert "answer" not in page_of(tmp_path)
    assert main(["report", str(tmp_path), "--with-samples", "101"]) == 2


def test_bad_folders_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "report.json").write_text('{"schema": "grpo-autotune/re')
    (tmp_path / "infinite").mkdir()
    (tmp_path / "infinite" / "report.json").write_text(json.dumps({**DEMO, "step_s": float("inf")}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "search.json").write_text('{"schema": "someone/else"}')
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "spans.jsonl").write_text(json.dumps(spans(1)))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "train_log.jsonl").write_text("\n[1]\n{\n")
    for name, words in {
        "torn": "not a JSON file",
        "infinite": "not a JSON file",
        "other": "schema",
        "going": "under way",
        "log": "no log",
        "none": "no report here",
    }.items():
        assert main(["report", str(tmp_path / name), "--html"]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1, name
    good = probed(tmp_path, 2)
    for more in (["x.html"], ["--html", "--json"], [str(tmp_path / "absent" / "x.html"), "--html"]):
        assert main(["report", str(good), *more]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_writes_the_page_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert main(["report", str(probed(tmp_path, 2)), "--html"]) == 0 and (tmp_path / "report.html").is_file()
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "a page.html"), "--open"]) == 0
    assert shown == [(tmp_path / "a page.html").as_uri()]


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (probed(tmp_path, 2) / "report.html").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(tmp_path)
    keep_page(tmp_path)
    assert capsys.readouterr().err.startswith("warning: no page: ")
    assert [path.name for path in tmp_path.glob(".report*")] == []
