"""Shell scripts, evaluated in a safe subset of bash and never run: the commands that a script would start.

Variables, arrays, arithmetic, `case`, `if`, `for`, `while` and here-documents are followed, and functions once, where
they are defined; no command is. Where a branch depends on the machine, it is that of a machine with NVIDIA GPUs.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tree_sitter import Node

from grpo_autotune.interop.reading import marks
from grpo_autotune.interop.reading.expansion import Expansion, Field, Unknown, Variables, evaluated, parsed
from grpo_autotune.interop.source import Word, shorter

NVIDIA = re.compile(r"(?i)nvidia|cuda|\bgpu\b")
NUMBERS = {"-eq": "==", "-ne": "!=", "-gt": ">", "-lt": "<", "-ge": ">=", "-le": "<="}
JOINTS = (({"||", "-o"}, True), ({"&&", "-a"}, False))  # between parts, and the truth that decides the whole
PLACEHOLDER = re.compile(  # `--model <your model>`, outside of quotes, comments and here-documents
    r"""\$?\(\((?:[^()]|\([^()]*\))*\)\)|\\[\s\S]|'[^']*'|"(?:\\[\s\S]|[^"\\])*"|(?<!\S)\#.*"""
    r"""|(?<!<)<<-?[ \t]*['"\\]?(?P<end>[A-Za-z_]\w*).*\n(?:.*\n)*?(?:\t*(?P=end)$|.*\Z)"""
    r"""|(?<=[\s=])(?P<name><[A-Za-z](?:[\w ./:-]*\w)?(?<![ ]\d)>)(?=\s)""",
    re.MULTILINE,
)
LONGEST_VALUE, MOST_TURNS, MOST_STEPS, DEEPEST = 1_000_000, 100, 20_000, 20


@dataclass(frozen=True)
class Command:
    """A command that the script would start, with the variables it is given."""

    words: list[Word]
    environment: dict[str, Word]
    line: int


@dataclass
class Shell:
    """The commands of a script, and the files that it writes."""

    commands: list[Command] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # here-documents, by the name they are written to
    warnings: list[str] = field(default_factory=list)


class _Ended(Exception):
    """The script ends here."""


def evaluate(text: str, environment: Mapping[str, str] | None = None) -> Shell:
    """The commands of a script; `environment` is what it is started with: variables, and its arguments by number."""
    text, given = with_names(text), dict(environment or {})
    last = max((int(key) for key in given if key.isdigit()), default=0)
    positional = [Field(given.pop(str(place), "")) for place in range(1, last + 1)]
    evaluation = _Evaluation(text, Variables({"HOME": "~", "PWD": ".", **given}, positional))
    evaluation.exported |= given.keys()
    with suppress(_Ended):
        evaluation.run(evaluation.tree)
    evaluation.result.warnings[:0] = cut_commands(text, evaluation.tree)
    return evaluation.result


def with_names(text: str) -> str:
    """The script with placeholders in quotes: `<your model>` is no redirection."""
    return PLACEHOLDER.sub(lambda match: f"'{match['name']}'" if match["name"] else match[0], text)


class _Evaluation:
    def __init__(self, text: str, variables: Variables, line: int | None = None) -> None:
        source, self.tree = parsed(text)
        self.variables, self.expand = variables, Expansion(source, variables, line)
        self.result, self.exported, self.depth = Shell(), set[str](), 0
        for error in [node for node in within(self.tree) if node.type == "ERROR"][:1]:
            self.warn(error, "this shell is not understood; what follows may be read wrongly")

    def warn(self, node: Node, what: str) -> None:
        text = f"line {self.expand.line(node.start_byte)}: {what}"
        if text not in self.result.warnings:
            self.result.warnings.append(text)

    def run(self, node: Node) -> bool | None:
        """Follow a statement. True or false as it succeeds, None if only a run can tell."""
        self.variables.steps += 1
        if self.variables.steps > MOST_STEPS:
            self.warn(node, "the script goes on without end; nothing is read from here on")
            raise _Ended
        handler = HANDLERS.get(node.type)
        return handler(self, node) if handler else self.each(node.named_children)

    def each(self, nodes: list[Node]) -> bool | None:
        last: bool | None = True
        for node in nodes:
            last = self.run(node)
        return last

    def assignment(self, node: Node) -> bool:
        name, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        key, adds = re.split(r"\W", self.expand.raw(node))[0], any(child.type == "+=" for child in node.children)
        if re.search(rf"\$\{{?{key}\b(?![:=?+-])", self.expand.raw(node)):
            self.variables.values.setdefault(key, "")
        if value is not None and value.type == "array":
            items = [item for item in value.named_children if item.type != "comment"]
            words = [word for item in items for word in self.expand.fields(item)]
            self.variables.values[key] = [*(self.variables.list(key) if adds else []), *words]
        elif name is not None:
            before = self.variables.text(key) if adds else None
            self.variables.values[key] = (before or "") + self.expand.text(value)
        if len(self.variables.values.get(key, "")) > LONGEST_VALUE:
            self.warn(node, f"{key} grows without end; nothing is read from here on")
            raise _Ended
        return True

    def declaration(self, node: Node) -> bool:
        for child in node.named_children:
            if child.type == "variable_assignment":
                self.assignment(child)
            if node.children[0].type == "export":
                self.exported.add(re.split(r"\W", self.expand.raw(child))[0])
        return True

    def command(self, node: Node) -> bool | None:
        words = [word for child in _fields(node, "name", "argument") for word in self.expand.fields(child)]
        texts = [marks.shown(word.text) for word in words]
        if not words:
            return True
        if texts[0] in BUILTINS:
            return BUILTINS[texts[0]](self, node, words[1:])
        if (script := _inner_script(texts)) and self.depth < DEEPEST:
            inner = _Evaluation(with_names(script), self.variables, self.expand.line(node.start_byte))
            inner.result, inner.exported, inner.depth = self.result, self.exported, self.depth + 1
            return inner.run(inner.tree)
        values = {key: self.variables.text(key) for key in self.exported}
        for child in node.named_children:
            if child.type == "variable_assignment":
                name = self.expand.raw(child).partition("=")[0]
                values[name] = self.expand.text(child.child_by_field_name("value"))
        given = {key: Field(text).word() for key, text in values.items() if text is not None}
        self.result.commands.append(Command([w.word() for w in words], given, self.expand.line(node.start_byte)))
        return True

    def ended(self, node: Node, words: list[Field]) -> bool:
        """`exit`: at the top the script ends; a branch may not be the one that is taken, and is read on."""
        if node.parent is not None and node.parent.type == "program":
            raise _Ended
        self.warn(node, "the script may end here; it is read on")
        return False

    def shifted(self, node: Node, words: list[Field]) -> bool:
        count = marks.plain(words[0].text) if words else "1"
        del self.variables.positional[: int(count) if count.isdigit() else 1]
        return True

    def sourced(self, node: Node, words: list[Field]) -> bool:
        self.warn(node, f"`{shorter(self.expand.raw(node))}` is not read")
        return True

    def redirected(self, node: Node) -> bool | None:
        """A statement with redirections; a here-document of `cat` or `tee` is kept as the file that it becomes."""
        parts = {part.type: part for part in within(node) if part.type.startswith(("heredoc", "file_redirect"))}
        body = self.expand.raw(node.named_children[0]).split()
        if "heredoc_body" not in parts or body[0] not in ("cat", "tee"):
            return self.run(node.named_children[0])
        text, start = parts["heredoc_body"], self.expand.raw(parts["heredoc_start"])
        place = parts["file_redirect"].child_by_field_name("destination") if "file_redirect" in parts else None
        name = marks.shown(self.expand.text(place)) or body[-1]
        self.result.files[name] = self.expand.raw(text) if start[0] in "'\"\\" else marks.shown(self.expand.text(text))
        return True

    def chain(self, node: Node) -> bool | None:
        """`a && b` and `a || b`; a command succeeds, a test that only a run can tell fails."""
        state = self.run(node.named_children[0])
        wanted = any(child.type == "&&" for child in node.children)
        return self.run(node.named_children[-1]) if bool(state) == wanted else state

    def branch(self, node: Node) -> bool | None:
        for conditions, body in _clauses(node):
            if not conditions or self.holds(conditions):
                return self.each(body)
        return True

    def holds(self, conditions: list[Node]) -> bool:
        """The condition of an `if`; a command in it is not run, so it holds if it asks for NVIDIA's GPUs."""
        states = [self.run(child) if self.expand.raw(child).startswith(TESTS) else None for child in conditions]
        if states[-1] is not None:
            return states[-1]
        text = " ".join(self.expand.raw(child) for child in conditions)
        guess = bool(NVIDIA.search(text)) and not text.startswith("!")
        self.warn(conditions[0], f"`if {shorter(text)}` depends on the machine: taken as {str(guess).lower()}")
        return guess

    def test(self, node: Node) -> bool | None:
        if node.children[0].type == "((":
            return self.counted(self.expand.raw(node)[2:-2])
        if node.type != "test_command":
            return self.each(node.named_children)
        return self.truth([part for child in node.children[1:-1] for part in parts(child)], node.children[0].type)

    def case(self, node: Node) -> bool | None:
        subject = node.named_children[0]
        text = marks.plain(self.expand.text(subject))
        for item in [child for child in node.named_children if child.type == "case_item"]:
            patterns = [marks.plain(self.expand.text(value)) for value in _fields(item, "value")]
            if marks.is_unknown(text):
                patterns = [pattern for pattern in patterns if NVIDIA.fullmatch(pattern)]
            fits = [pattern for pattern in patterns if self.alike(subject, text, pattern)]
            if fits and marks.is_unknown(text):
                self.variables.values[re.sub(r"\W", "", self.expand.raw(subject))] = fits[0]
            if fits:
                return self.each([c for c in item.named_children if c not in _fields(item, "value", "termination")])
        return True

    def loop(self, node: Node) -> bool:
        """A loop; where only a run can tell how often it turns, it is followed once."""
        body = node.child_by_field_name("body")
        for _, state in zip(range(MOST_TURNS if body else 0), self.conditions(node), strict=False):
            if state is None:
                self.warn(node, f"a loop (`{shorter(self.expand.raw(node))}`) is followed once")
            if state is not False:
                self.each([body] if body else [])
            if not state:
                break
        return True

    def conditions(self, node: Node) -> Iterator[bool | None]:
        """True for each turn of a loop, then false."""
        text = self.expand.raw(node)
        if node.type == "for_statement":
            for word in [word for value in _fields(node, "value") for word in self.expand.fields(value)]:
                self.variables.values |= {self.expand.raw(name): word.text for name in _fields(node, "variable")}
                yield True
        while node.type == "while_statement":
            state = self.run(node.named_children[0])
            known = self.expand.raw(node.named_children[0]).startswith(TESTS[:-2]) and state is not None
            yield state == text.startswith("while") if known else None

    def truth(self, nodes: list[Node], bracket: str = "[") -> bool | None:
        """The truth of a test's words; in `[[` texts compare with patterns."""
        signs = [self.expand.raw(node) for node in nodes]
        for joints, decides in JOINTS:
            level = (
                n for n, sign in enumerate(signs) if signs[:n].count("(") == signs[:n].count(")") and sign in joints
            )
            if (place := next(level, None)) is not None:
                state = self.truth(nodes[:place], bracket)
                return state if bool(state) == decides else self.truth(nodes[place + 1 :], bracket)
        if signs[:1] == ["!"]:
            state = self.truth(nodes[1:], bracket)
            return None if state is None else not state
        if signs[:1] == ["("]:
            return self.truth(nodes[1:-1], bracket)
        if len(nodes) == 2:
            return {"-z": not self.tested(nodes[1]), "-n": bool(self.tested(nodes[1]))}.get(signs[0])
        if len(nodes) > 2:
            return self.compared(nodes, signs[1], bracket == "[[")
        return bool(nodes and self.tested(nodes[0]))

    def compared(self, nodes: list[Node], sign: str, pattern: bool) -> bool | None:
        left, right = self.tested(nodes[0]), "".join(self.tested(node) for node in nodes[2:])
        if sign in ("=", "==", "!="):
            return self.alike(nodes[0], left, right, pattern) == (sign != "!=")
        if sign == "=~":
            with suppress(re.error):
                return None if marks.is_unknown(left + right) else bool(re.search(self.expand.raw(nodes[2]), left))
        with suppress(Unknown, KeyError):
            return bool(evaluated(f"({left or 0}){NUMBERS[sign]}({right or 0})", self.expand.operand))
        return None

    def counted(self, expression: str) -> bool | None:
        """True unless an arithmetic expression is 0; None if it is not known."""
        with suppress(Unknown):
            return bool(self.expand.computed(expression))
        return None

    def tested(self, node: Node) -> str:
        """A text in a test: nothing for a variable that nothing sets."""
        text, raw = marks.plain(self.expand.text(node)), self.expand.raw(node).strip("\"'")
        unset = marks.is_unknown(text) and marks.shown(text) == raw and re.fullmatch(r"\$\w+|\$\{\w+\}", raw)
        return "" if unset else text

    def alike(self, node: Node, left: str, right: str, pattern: bool = True) -> bool:
        """True if a text is another; one that only a run can tell is taken as that of NVIDIA's GPUs."""
        if not marks.is_unknown(left):
            return fnmatchcase(left, right) if pattern else left == right
        same = bool(NVIDIA.fullmatch(right))
        taken = right if same else f"not {right}"
        self.warn(node, f"`{shorter(self.expand.raw(node))}` depends on the machine: taken as {taken}")
        return same


HANDLERS: Mapping[str, Callable[[_Evaluation, Node], bool | None]] = {
    "variable_assignment": _Evaluation.assignment, "declaration_command": _Evaluation.declaration,
    "command": _Evaluation.command,
    "redirected_statement": _Evaluation.redirected, "list": _Evaluation.chain,
    "negated_command": lambda self, node: {None: None, True: False, False: True}[self.run(node.named_children[-1])],

    "if_statement": _Evaluation.branch, "test_command": _Evaluation.test, "case_statement": _Evaluation.case,
    "for_statement": _Evaluation.loop, "while_statement": _Evaluation.loop, "compound_statement": _Evaluation.test,
    "comment": lambda none, node: True,
}  # fmt: skip
BUILTINS: Mapping[str, Callable[[_Evaluation, Node, list[Field]], bool | None]] = {
    **dict.fromkeys(("true", ":", "set", "return", "break", "continue"), lambda *none: True),
    "exit": _Evaluation.ended, "shift": _Evaluation.shifted, "source": _Evaluation.sourced, ".": _Evaluation.sourced,
    "false": lambda *none: False,
    "test": lambda self, node, words: self.truth(_fields(node, "argument")),
}  # fmt: skip
TESTS = ("[", "((", "! [", "test ", "true", "false")  # beginnings of a condition that is evaluated, and not guessed


def _fields(node: Node, *names: str) -> list[Node]:
    return [child for place, child in enumerate(node.children) if node.field_name_for_child(place) in names]


def _clauses(node: Node) -> list[tuple[list[Node], list[Node]]]:
    clauses: list[tuple[list[Node], list[Node]]] = []
    part = 0
    for child in node.children:
        for inner in child.children if child.type in ("elif_clause", "else_clause") else [child]:
            if inner.type in ("if", "elif", "else"):
                clauses.append(([], []))
            part = {"if": 0, "elif": 0, "else": 1, "then": 1}.get(inner.type, part)
            if inner.is_named and inner.type != "comment":
                clauses[-1][part].append(inner)
    return clauses


def _inner_script(words: list[str]) -> str | None:
    if words[0] == "eval":
        return " ".join(words[1:])
    shells = (place for place, word in enumerate(words[:-2]) if re.fullmatch(r"(.*/)?(ba|z|da)?sh", word))
    return next((words[place + 2] for place in shells if re.fullmatch(r"-\w*c", words[place + 1])), None)


ARGUMENT = re.compile(r"\s*(-{1,2}[A-Za-z][\w-]*|[+~]{0,2}[\w./@-]+(?==)|\"?\$[\w{@])")


def within(node: Node) -> Iterator[Node]:
    """A node and all below it."""
    yield node
    for child in node.children:
        yield from within(child)


def cut_commands(text: str, tree: Node) -> list[str]:
    """Warnings of commands that a comment, or a space behind a backslash, cuts before their end."""
    lines, warnings = text.splitlines(), []
    source = text.encode()
    comments = {source.count(b"\n", 0, node.start_byte) for node in within(tree) if node.type == "comment"}
    for number in range(len(lines)):
        after_more = number > 0 and lines[number - 1].endswith("\\") and number - 1 not in comments
        alone = number in comments and lines[number].lstrip().startswith("#")
        comment = alone and after_more
        if not comment and (alone or not re.search(r"(^|[^\\])\\[ \t]+(#.*)?$", lines[number])):
            continue
        start = next((n for n in range(number + 1, len(lines)) if n not in comments), len(lines))
        end = next((n for n in range(start, len(lines)) if not lines[n].endswith("\\")), len(lines) - 1)
        if names := [match[1] for lost in lines[start : end + 1] if (match := ARGUMENT.match(lost))]:
            what = "a comment" if comment else "a space behind the backslash"
            lost = f"lines {start + 1} to {end + 1} are not passed to it ({', '.join(names)})"
            warnings.append(f"line {number + 1}: {what} ends the command here; {lost}")
    return warnings


def parts(node: Node) -> list[Node]:
    """The words of a test."""
    if node.type not in ("binary_expression", "unary_expression", "parenthesized_expression"):
        return [node]
    return [part for child in node.children for part in parts(child)]
