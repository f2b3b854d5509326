"""Shell scripts evaluated without a shell: the words of each command, with their lines."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from bash_argv import PROGRAMS, UNSAFE, agrees, argv_of_bash

from grpo_autotune.interop.reading.shell import evaluate

SCRIPTS = {
    "plain": "python3 -m a.b x=1 \\\n  y='two words' \"z=$HOME/q\" w=a\\ b --flag\n",
    "arrays": 'A=(a=1 "b c"\n # comment\n d=${V:-4})\nA+=(e)\nB=("${A[@]}" f)\npython3 "${B[@]}" n=${#B[@]} '
    '${A[1]} "${A[*]}" ${A[@]} "x${A[@]}y" "${NONE[@]}" ${A[@]+"${A[@]}"}\n',
    "defaults": 'A=1; E=\npython3 ${A:-2} ${B:-2} ${E:-3} "${E-3}" ${C:=4} $C ${A:+set} "${B:+set}" '
    '${B:-"a b"} ${B:-a b} "${B:-$A}" ${1:-vllm} ${A:?no} x${E}y $E\n',
    "arithmetic": 'n=3; m="$((n*2))"\npython3 $((n + m)) $(( (n+1) * -m / 4 )) $((7/2)) $((-7%3)) '
    '$((2**10)) ${X:-$(((n + 1) * 2))} "a$((n))b" $((31+010)) $((!n)) $((n==3&&m<9))\n',
    "strings": 's=/a/b/model.tar.gz; l=ABC\npython3 ${s##*/} ${s%.*} ${s%%.*} ${s#*/} ${l,,} ${#s} ${l,}\n',
    "quotes": "a=\"x  'y'\"; b='$a \"q\"'\n"
    "python3 $a \"$a\" \"$b\" 'it'\\''s' \"a\\\"b\\$c\\n\" \"\" '' x\"\"y a\\\nb\n",
    "lines": 'O="--lr 1 \\\n --beta 2\n --c=3"\nO="$O --d"\npython3 $O "$O"\n',
    "case": 'D=gpu\ncase "$D" in npu) x=1;; gpu|cuda) x=2;; *) x=3;; esac\ncase $D in g*) y=4;; esac\npython3 $x $y\n',
    "if": 'a=1; E=()\nif [ "$a" = 2 ]; then b=x; elif [[ $a == [0-9] && -n $a ]]; then b=y; else b=z; fi\n'
    'if [ -z "${Q:-}" ] || [ $a -gt 3 ]; then c=1; fi\nif ! [ $a -eq 1 ]; then d=1; else d=2; fi\n'
    'if (( a + 1 == 2 )); then E=(k=v); fi\n[ "$a" = 1 ] && e=5\n[ "$a" = 2 ] || f=6\n'
    'python3 $b $c $d $e $f "${E[@]}"\n',
    "for": 'for i in 1 2 "3 4"; do python3 --i $i; done\nfor i in 1 2 3; do L="$L $i"; done\npython3 $L\n',
    "functions": 'f() {\npython3 a --b 1\n}\nf\n',
    "environment": 'export A=1 B\nB=2\nC=3 D="x y" python3 a\npython3 c $B\n',
    "runs": "nohup torchrun --nproc_per_node=8 a.py --x 1 > log 2>&1 &\nwait\nswift rlhf --y 2 | tee log\n",
    "here": 'N=4\ncat > c.yaml <<EOF\na: $N\nb: ${N}0\nEOF\n'
    'cat <<\'EOF\' > d.yaml\na: $N\nEOF\npython3 --config c.yaml\n',
    "cut": "python3 a \\\n  --b 1 \\\n# --c 2 \\\n  --d 3 \\\n  --e 4\npython3 next\n",
    "space": "python3 a \\\n --b 1 \\ \n --c 2\n",
    "inner": 'C="python3 -m x --a 1"\neval "$C --b 2"\n$C --c "3 4"\n',
    "exit": "python3 a\nexit 0\npython3 b\n",
    "counts": 'i=0; until [ $i -ge 3 ]; do i=$((i+1)); python3 $i; done\n',
    "tests": 'true || a=0; if true; then a=1; fi; if test 3 -gt 2; then b=1; fi; [[ a1 =~ ^a[0-9]$ ]] && c=1\n'
    'x=5; h="p q"; [ $x -ge 5 -a $x -le 9 ] && d=1; [[ $h == *" "* ]] && e=1;\n'
    "python3 $a $b $c $d $e\n",
    "unicode": "m=模型\npython3 name=$m 'ü'  # äöü\n",
    "crowd": 'python3 a=$(( 1 +\n 2 )) b="x\ny"\n',
}  # fmt: skip


def commands(text: str, **environment: str) -> list[list[str]]:
    return [[word.text for word in command.words] for command in evaluate(text, environment=environment).commands]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_words_as_bash(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(SCRIPTS[name])
    theirs = argv_of_bash(script, tmp_path / "run", {}, [])
    ours = [words for words in commands(SCRIPTS[name]) if words[0] in PROGRAMS]
    assert sorted(ours) == sorted(theirs) and theirs


def expressions() -> st.SearchStrategy[tuple[str, int]]:
    """Text of an expression, and its value."""
    numbers = st.integers(0, 99).map(lambda number: (str(number), number))

    def larger(inner: st.SearchStrategy[tuple[str, int]]) -> st.SearchStrategy[tuple[str, int]]:
        def joined(left: tuple[str, int], sign: str, right: tuple[str, int]) -> tuple[str, int]:
            values = {"+": left[1] + right[1], "-": left[1] - right[1], "*": left[1] * right[1]}
            values |= {"<": int(left[1] < right[1]), "==": int(left[1] == right[1])}
            return f"({left[0]}) {sign} ( {right[0]})", values[sign]

        return st.builds(joined, inner, st.sampled_from(["+", "-", "*", "<", "=="]), inner)

    return st.recursive(numbers, larger, max_leaves=6)


@given(expressions())
@settings(max_examples=60)
def test_arithmetic(expression: tuple[str, int]) -> None:
    text, value = expression
    assert commands(f"python3 $(({text})) ${{X:-$(( {text} ))}}") == [["python3", str(value), str(value)]]


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Co", "Cs"])), min_size=1
    )
)
@settings(max_examples=60)
def test_quoted_words_come_through(texts: list[str]) -> None:
    quoted = ["'" + text.replace("'", "'\\''") + "'" for text in texts]
    assert commands(f'A=({" ".join(quoted)})\npython3 "${{A[@]}}"') == [["python3", *texts]]


def test_lines_and_how_words_are_written() -> None:
    script = 'B=${B:-512}\nA=(\n  x=1\n  y=${B}\n)\nO="--lr 1 \\\n --c=3"\npython3 "${A[@]}" $O \\\n  --n $B z="$B"\n'
    (command,) = evaluate(script).commands
    assert command.line == 8
    assert [(word.text, word.line, word.written) for word in command.words] == [
        ("python3", 8, None), ("x=1", 3, None), ("y=512", 4, "y=${B}"), ("--lr", 6, None), ("1", 6, None),
        ("--c=3", 7, None), ("--n", 9, None), ("512", 1, "$B"), ("z=512", 9, 'z="$B"'),
    ]  # fmt: skip


def test_the_environment_fills_what_the_script_leaves_to_it() -> None:
    script = "A=${A:-1}\nB=2\npython3 $A $B ${C:-3} ${1:-vllm} $#\n"
    assert commands(script) == [["python3", "1", "2", "3", "vllm", "0"]]
    assert commands(script, A="7", B="8", C="9", **{"1": "hf"}) == [["python3", "7", "2", "9", "hf", "1"]]


def test_what_only_a_run_can_tell_is_kept_as_text() -> None:
    shell = evaluate(
        'N=$(nproc --all)\nT=`date +%s`\nU=$((N * 2))\npython3 $N "a-$T" $((N+1)) $U $NONE ${NO:-$(x y)}\n'
    )
    (command,) = shell.commands
    assert [word.text for word in command.words[1:]] == [
        "$(nproc --all)", "a-`date +%s`", "$((N+1))", "$((N * 2))", "$NONE", "$(x y)",
    ]  # fmt: skip
    assert [word.missing for word in command.words[1:]] == [(), (), (), (), ("NONE",), ()]


def test_a_branch_of_the_machine_is_that_of_nvidia() -> None:
    script = (
        "D=$(python3 -c 'import torch_npu' && echo npu || echo gpu)\n"
        'case "$D" in npu) x=1;; gpu) x=2;; esac\n[ "$D" = npu ] && x=3\npython3 $x $D\n'
        "if command -v nvidia-smi; then y=1; else y=2; fi\nif npu-smi info; then z=1; fi\npython3 $y ${z:-0}\n"
        'E=$(x)\nif [ "$E" == cuda ]; then w=1; else w=2; fi\npython3 $w\n'
    )
    shell = evaluate(script)
    assert [[word.text for word in command.words] for command in shell.commands] == [
        ["python3", "2", "gpu"], ["python3", "1", "0"], ["python3", "1"],
    ]  # fmt: skip
    assert [warning.partition(":")[0] for warning in shell.warnings] == ["line 2", "line 5", "line 6", "line 9"]


def test_warnings_of_what_is_lost_or_not_read() -> None:
    assert evaluate(SCRIPTS["cut"]).warnings == [
        "line 3: a comment ends the command here; lines 4 to 5 are not passed to it (--d, --e)"
    ]
    assert evaluate(SCRIPTS["space"]).warnings == [
        "line 2: a space behind the backslash ends the command here; lines 3 to 3 are not passed to it (--c)"
    ]
    assert "lines 2 to 3" in evaluate("python3 a \\  # note\n b=1 \\\n --c=2\n").warnings[0]
    assert evaluate("python3 a \\\n # the end\n\npython3 b\n").warnings == []
    assert "is not read" in evaluate("source conf.sh\n").warnings[0]
    assert "followed once" in evaluate("while true; do python3 a; done\n").warnings[0]
    assert evaluate("python3 $1\n").commands[0].words[1].line == 1
    assert "not understood" in evaluate("python3 --x < > b\n").warnings[0]
    usage = 'if [ $# -lt 1 ]; then echo usage; exit 1; fi\npython3 "$1"\n'
    assert commands(usage)[-1] == ["python3", "$1"] and "may end here" in evaluate(usage).warnings[0]


def test_here_documents_are_files() -> None:
    assert evaluate(SCRIPTS["here"]).files == {"c.yaml": "a: 4\nb: 40\n", "d.yaml": "a: $N\n"}


def test_variables_that_a_command_is_given() -> None:
    (first, *_) = evaluate(SCRIPTS["environment"]).commands
    assert {name: word.text for name, word in first.environment.items()} == {"A": "1", "B": "2", "C": "3", "D": "x y"}
    assert first.environment["B"].line == 2


@pytest.mark.parametrize(
    "text",
    [
        "f() { f; f; }\nf\n", "f() { g; }\ng() { f; }\nf\n", "A=$A$A\nA=$A$A\n", "eval 'eval \"eval x\"'\n", "((((",
        "if [", "${", "'", '"$(', "case x in", "for i in", "a=(", "\\",
        "python3 $(( 9**99999999 )) $((1/0)) $((1<<999999999))\n",
        "x=$((y)); y=$((x))\npython3 $x\n", "A=(1 2)\npython3 ${A[9]} ${A[-1]} ${A[x]}\n", "exit\n", "return\n",
        "}\n;;\n", "for i in {1..999999999}; do for j in {1..99999999}; do python3; done; done\n", "\x00\x01",
        "a=" + "(" * 500, "[[ a =~ [ ]]\n[[ a =~ *( ]]\n", "let\nbreak\n", "for ((;;)); do python3; done",
        "while", "for ((a)); do x; done", "for ((", "[ ( ]; [ ! ]; [ a b c d ]; test; [[ ]]", "declare\nlocal\n",
        "if " * 300, "$(" * 300, "X=x; " + "X=$X$X; " * 60,
    ],
)  # fmt: skip
def test_no_script_is_too_much(text: str) -> None:
    evaluate(text)


@given(st.text(alphabet="ab=$(){}[]\"'\\ \n;|&<>#*?-+:/0123`", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_evaluated(text: str) -> None:
    evaluate(text)


@pytest.mark.slow
@pytest.mark.skipif("GRPO_AUTOTUNE_MIRRORS" not in os.environ, reason="needs the public repositories")
def test_public_scripts_give_the_same_words_as_bash(tmp_path: Path) -> None:
    from public_files import scripts

    wrong, same = [], 0
    for place, (name, text) in enumerate(scripts()):
        if UNSAFE.search(text.partition("\n")[2]):
            continue
        script = tmp_path / f"{place}.sh"
        script.write_text(text)
        theirs = argv_of_bash(script, tmp_path / str(place), {}, [])
        ours = [words for words in commands(text) if words[0] in PROGRAMS and words[1:2] != ["-c"]]
        pairs = zip(sorted(ours), sorted(theirs), strict=False)
        if theirs and len(ours) == len(theirs) and all(agrees(*pair) for pair in pairs):
            same += 1
        elif theirs:
            wrong.append(name)
    assert same > 500 and len(wrong) <= same / 100, json.dumps(wrong)
