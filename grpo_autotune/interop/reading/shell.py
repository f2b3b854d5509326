"""Shell scripts, evaluated in a safe subset of bash and never run: the commands that a script would start.

Variables, arrays, arithmetic, `case`, `if`, `for`, functions and here-documents are followed; no command is. Where a
branch depends on the machine, it is the one of a machine with NVIDIA GPUs.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tree_sitter import Node

from grpo_autotune.interop.reading import arithmetic, marks
from grpo_autotune.interop.reading.expansion import Expansion, Field, Variables, parsed
from grpo_autotune.interop.reading.words import Word

NVIDIA = re.compile(r"(?i)nvidia|cuda|\bgpu\b")
ARGUMENT = re.compile(r"\s*(-{1,2}[A-Za-z][\w-]*|[+~]{0,2}[\w./@-]+(?==)|\"?\$[\w{@])")
MOST_TURNS, MOST_COMMANDS, DEEPEST = 100, 5_000, 20


@dataclass(frozen=True)
class Command:
    """A command that the script would start, with the variables it is given."""

    words: list[Word]
    environment: dict[str, Word]
    line: int


@dataclass
class Shell:
    """What a script would do."""

    commands: list[Command] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # here-documents, by the name they are written to
    warnings: list[str] = field(default_factory=list)


class _Ended(Exception):
    """The script, or the function, ends here."""


def evaluate(text: str, name: str = "script.sh", environment: Mapping[str, str] | None = None) -> Shell:
    """The commands of a script. `environment` is what it is started with: variables, and its arguments by number
    ("1"), which fill what the script leaves to them, as in bash."""
    given = dict(environment or {})
    places = [int(key) for key in given if key.isdigit()]
    positional = [Field(given.get(str(place), "")) for place in range(1, max(places, default=0) + 1)]
    values: dict[str, str | list[Field]] = {"HOME": "~", "PWD": "."}
    values |= {key: value for key, value in given.items() if not key.isdigit()}
    evaluation = _Evaluation(text, Variables(values, positional, name))
    evaluation.exported |= given.keys() & values.keys()
    try:
        evaluation.run(evaluation.tree)
    except _Ended:
        pass
    except RecursionError:
        evaluation.warn(None, "functions call each other without end")
    evaluation.result.warnings[:0] = _cut_commands(text, evaluation.tree)
    return evaluation.result


class _Evaluation:
    """One script on its way."""

    def __init__(self, text: str, variables: Variables, line: int | None = None) -> None:
        source, self.tree = parsed(text)
        self.variables, self.expand = variables, Expansion(source, variables, line)
        self.result, self.exported, self.functions, self.depth = Shell(), set[str](), dict[str, Node](), 0
        if self.tree.has_error:
            error = next(_errors(self.tree))
            self.warn(error, "this shell is not understood; what follows may be read wrongly")

    def warn(self, node: Node | None, what: str) -> None:
        text = what if node is None else f"line {self.expand.line(node.start_byte)}: {what}"
        if text not in self.result.warnings:
            self.result.warnings.append(text)

    def run(self, node: Node) -> bool | None:
        """Follow a statement. True or false as it succeeds, None if only a run can tell."""
        if len(self.result.commands) > MOST_COMMANDS:
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
        if name is None:
            return True
        key, adds = self.expand.raw(name), any(child.type == "+=" for child in node.children)
        if value is not None and value.type == "array":
            words = [
                word for item in value.named_children if item.type != "comment" for word in self.expand.fields(item)
            ]
            self.variables.values[key] = [*(self.variables.list(key) if adds else []), *words]
        elif name.type == "variable_name":
            text = "" if value is None else self.expand.text(value)
            self.variables.values[key] = (self.variables.text(key) or "") + text if adds else text
        return True

    def declaration(self, node: Node) -> bool:
        exports = self.expand.raw(node).startswith("export")
        for child in node.named_children:
            if child.type == "variable_assignment":
                self.assignment(child)
            if exports and child.type in ("variable_assignment", "variable_name"):
                self.exported.add(re.split(r"\W", self.expand.raw(child))[0])
        return True

    def command(self, node: Node) -> bool | None:
        words = [word for child in self._words(node) for word in self.expand.fields(child)]
        prefix = [child for child in node.children if child.type == "variable_assignment"]
        if not words:
            return True
        name = marks.shown(words[0].text)
        if name in BUILTINS:
            return BUILTINS[name](self, node, words[1:])
        texts = [marks.shown(word.text) for word in words]
        if script := _inner_script(texts):
            return self.inside(script, self.expand.line(node.start_byte))
        if name in self.functions and self.depth < DEEPEST:
            return self.called(self.functions[name], words[1:])
        values = {key: self.variables.text(key) for key in self.exported}
        for child in prefix:
            key, value = child.child_by_field_name("name"), child.child_by_field_name("value")
            if key is not None:
                values[self.expand.raw(key)] = "" if value is None else self.expand.text(value)
        given = {key: Field(text).word() for key, text in values.items() if text is not None}
        line = self.expand.line(node.start_byte)
        self.result.commands.append(Command([word.word() for word in words], given, line))
        return True

    def _words(self, node: Node) -> Iterator[Node]:
        for place, child in enumerate(node.children):
            if node.field_name_for_child(place) in ("name", "argument"):
                yield child

    def called(self, body: Node, words: list[Field]) -> bool | None:
        outer, self.variables.positional = self.variables.positional, words
        self.depth += 1
        try:
            return self.run(body)
        except _Returned:
            return True
        finally:
            self.variables.positional = outer
            self.depth -= 1

    def inside(self, script: str, line: int) -> bool | None:
        """A script in a text: of `eval` or `bash -c`."""
        inner = _Evaluation(script, self.variables, line)
        inner.result, inner.exported, inner.functions, inner.depth = self.result, self.exported, {}, self.depth + 1
        return inner.run(inner.tree) if self.depth < DEEPEST else None

    def defined(self, node: Node) -> bool:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
        if name is not None and body is not None:
            self.functions[self.expand.raw(name)] = body
        return True

    def ended(self, node: Node, words: list[Field]) -> bool:
        """`exit`: at the top the script ends; inside a branch, which may not be the one that is taken, it is read on."""
        parent = node.parent
        if parent is not None and parent.type == "program":
            raise _Ended
        self.warn(node, "the script may end here; it is read on")
        return False

    def returned(self, node: Node, words: list[Field]) -> bool:
        raise _Returned

    def shifted(self, node: Node, words: list[Field]) -> bool:
        count = marks.plain(words[0].text) if words else "1"
        del self.variables.positional[: int(count) if count.isdigit() else 1]
        return True

    def set(self, node: Node, words: list[Field]) -> bool:
        if words and marks.plain(words[0].text) == "--":
            self.variables.positional = words[1:]
        return True

    def sourced(self, node: Node, words: list[Field]) -> bool:
        self.warn(node, f"`{' '.join(self.expand.raw(node).split())}` is not read")
        return True

    def unset(self, node: Node) -> bool:
        for child in node.named_children:
            self.variables.values.pop(self.expand.raw(child), None)
        return True

    def redirected(self, node: Node) -> bool | None:
        body = node.child_by_field_name("body")
        text, target = None, None
        for child in (inner for outer in node.named_children for inner in (outer, *outer.named_children)):
            if child.type == "heredoc_body":
                start = (
                    next((c for c in child.parent.children if c.type == "heredoc_start"), None)
                    if child.parent
                    else None
                )
                quoted = start is not None and self.expand.raw(start)[:1] in "'\"\\"
                text = self.expand.raw(child) if quoted else marks.shown(self.expand.text(child))
            elif child.type == "file_redirect" and (place := child.child_by_field_name("destination")) is not None:
                if not any(c.type == "file_descriptor" for c in child.children):
                    target = marks.shown(self.expand.text(place))
        if text is not None and body is not None and self.expand.raw(body).startswith(("cat", "tee")):
            target = target or self.expand.raw(body).split()[-1]
            self.result.files[target] = text
            return True
        return True if body is None else self.run(body)

    def chain(self, node: Node) -> bool | None:
        """`a && b` and `a || b`; a command succeeds, a test that only a run can tell fails."""
        left, right = node.named_children[0], node.named_children[-1]
        sign = next((child.type for child in node.children if child.type in ("&&", "||")), "&&")
        state = self.run(left)
        return self.run(right) if bool(state) == (sign == "&&") else state

    def negated(self, node: Node) -> bool | None:
        state = self.run(node.named_children[-1])
        return None if state is None else not state

    def branch(self, node: Node) -> bool | None:
        """`if`, with `elif` and `else`."""
        body: list[Node] = []
        conditions: list[Node] = []
        after = False
        for place, child in enumerate(node.children):
            if child.type == "then":
                after = True
            elif child.is_named and child.type not in ("elif_clause", "else_clause", "comment"):
                (body if after else conditions).append(child)
        if self.holds(conditions, node):
            return self.each(body)
        for child in node.named_children:
            if child.type == "elif_clause" and self._elif(child):
                return True
            if child.type == "else_clause":
                return self.each(child.named_children)
        return True

    def _elif(self, node: Node) -> bool:
        then = next(place for place, child in enumerate(node.children) if child.type == "then")
        if not self.holds([child for child in node.children[:then] if child.is_named], node):
            return False
        self.each([child for child in node.children[then:] if child.is_named])
        return True

    def holds(self, conditions: list[Node], node: Node) -> bool:
        states = [self.run(child) if child.type in TESTS else None for child in conditions]
        if states and states[-1] is not None:
            return states[-1]
        text = " ".join(self.expand.raw(child) for child in conditions)
        guess = bool(NVIDIA.search(text)) and not text.lstrip().startswith("!")
        self.warn(node, f"`if {shorter(text)}` depends on the machine: taken as {'true' if guess else 'false'}")
        return guess

    def test(self, node: Node) -> bool | None:
        inner = [child for child in node.children if child.is_named and child.type != "comment"]
        if node.children and node.children[0].type == "((":
            try:
                return bool(arithmetic.evaluate(node, self.expand.operand))
            except arithmetic.Unknown:
                return None
        return self.truth(inner[0], node.children[0].type == "[[") if inner else False

    def truth(self, node: Node, double: bool) -> bool | None:
        """The truth of an expression of `[` or `[[`."""
        inner = node.named_children
        sign = node.child_by_field_name("operator")
        if node.type == "parenthesized_expression":
            return self.truth(inner[0], double)
        if node.type == "unary_expression" and sign is not None:
            name = self.expand.raw(sign)
            if name == "!":
                state = self.truth(inner[-1], double)
                return None if state is None else not state
            text = self.tested(inner[-1])
            return {"-z": not text, "-n": bool(text)}.get(name) if name in ("-z", "-n") else None
        if node.type == "binary_expression" and sign is not None:
            return self.compared(inner, self.expand.raw(sign), double)
        return bool(self.tested(node))

    def tested(self, node: Node) -> str:
        """A text in a test: nothing for a variable that nothing sets."""
        text = marks.plain(self.expand.text(node))
        raw = self.expand.raw(node).strip("\"'")
        return (
            ""
            if marks.is_unknown(text) and re.fullmatch(r"\$\w+|\$\{\w+\}", raw) and marks.shown(text) == raw
            else text
        )

    def compared(self, inner: list[Node], sign: str, double: bool) -> bool | None:
        if sign in ("&&", "-a", "||", "-o"):
            left = self.truth(inner[0], double)
            return self.truth(inner[-1], double) if bool(left) == (sign in ("&&", "-a")) else left
        left, right = self.tested(inner[0]), self.tested(inner[-1])
        if sign in ("=", "==", "!="):
            return self.alike(left, right, double) == (sign != "!=")
        numbers = {"-eq": "==", "-ne": "!=", "-gt": ">", "-lt": "<", "-ge": ">=", "-le": "<="}
        try:
            return bool(arithmetic.INFIX[numbers[sign]](arithmetic.number(left), arithmetic.number(right)))
        except (arithmetic.Unknown, KeyError):
            return None

    def alike(self, left: str, right: str, pattern: bool) -> bool:
        if marks.is_unknown(left):
            return bool(NVIDIA.fullmatch(right))
        return fnmatchcase(left, right) if pattern else left == right

    def case(self, node: Node) -> bool | None:
        """`case`: the first pattern that fits; of an unknown text the one of NVIDIA's GPUs, which it then is."""
        subject = node.child_by_field_name("value")
        text = marks.plain(self.expand.text(subject)) if subject is not None else ""
        unknown = marks.is_unknown(text)
        items = [child for child in node.named_children if child.type == "case_item"]
        for item in items:
            values = [child for place, child in enumerate(item.children) if item.field_name_for_child(place) == "value"]
            patterns = [marks.plain(self.expand.text(value)) for value in values]
            fits = [p for p in patterns if (NVIDIA.fullmatch(p) if unknown else fnmatchcase(text, p))]
            if fits:
                if unknown and subject is not None:
                    self.variables.values[re.sub(r"\W", "", self.expand.raw(subject))] = fits[0]
                    self.warn(node, f"`{self.expand.raw(subject)}` depends on the machine: taken as {fits[0]}")
                return self.each(
                    [
                        c
                        for place, c in enumerate(item.children)
                        if c.is_named and item.field_name_for_child(place) not in ("value", "termination")
                    ]
                )
        return True

    def loop(self, node: Node) -> bool | None:
        variable, body = node.child_by_field_name("variable"), node.child_by_field_name("body")
        values = [child for place, child in enumerate(node.children) if node.field_name_for_child(place) == "value"]
        if variable is None or body is None:
            return True
        for word in [word for value in values for word in self.expand.fields(value)][:MOST_TURNS]:
            self.variables.values[self.expand.raw(variable)] = word.text
            self.run(body)
        return True

    def skipped(self, node: Node) -> bool:
        if not (node.type == "while_statement" and self.run(node.named_children[0]) is False):
            self.warn(node, f"a loop (`{shorter(self.expand.raw(node))}`) is not followed")
        return True

    def subshell(self, node: Node) -> bool | None:
        outer = dict(self.variables.values)
        try:
            return self.each(node.named_children)
        finally:
            self.variables.values.clear()
            self.variables.values.update(outer)


class _Returned(Exception):
    """The function ends here."""


Handler = Callable[[_Evaluation, Node], bool | None]
HANDLERS: Mapping[str, Handler] = {
    "variable_assignment": _Evaluation.assignment, "declaration_command": _Evaluation.declaration,
    "command": _Evaluation.command, "function_definition": _Evaluation.defined, "unset_command": _Evaluation.unset,
    "redirected_statement": _Evaluation.redirected, "list": _Evaluation.chain, "negated_command": _Evaluation.negated,
    "if_statement": _Evaluation.branch, "test_command": _Evaluation.test, "case_statement": _Evaluation.case,
    "for_statement": _Evaluation.loop, "while_statement": _Evaluation.skipped, "subshell": _Evaluation.subshell,
    "c_style_for_statement": _Evaluation.skipped, "comment": lambda none, node: True,
}  # fmt: skip
BUILTINS: Mapping[str, Callable[[_Evaluation, Node, list[Field]], bool | None]] = {
    "exit": _Evaluation.ended, "return": _Evaluation.returned, "shift": _Evaluation.shifted, "set": _Evaluation.set,
    "source": _Evaluation.sourced, ".": _Evaluation.sourced, "true": lambda *none: True, "false": lambda *none: False,
    ":": lambda *none: True,
}  # fmt: skip
TESTS = ("test_command", "list", "negated_command", "compound_statement")


def _inner_script(words: list[str]) -> str | None:
    """The script that `eval` or `bash -c` is given."""
    if words[0] == "eval":
        return " ".join(words[1:])
    shells = (place for place, word in enumerate(words[:-2]) if re.fullmatch(r"(.*/)?(ba|z|da)?sh", word))
    return next((words[place + 2] for place in shells if re.fullmatch(r"-\w*c", words[place + 1])), None)


def shorter(text: str, most: int = 60) -> str:
    """The text's first line, at most so many characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _errors(node: Node) -> Iterator[Node]:
    if node.type == "ERROR" or node.is_missing:
        yield node
    for child in node.children:
        if child.has_error:
            yield from _errors(child)


def _cut_commands(text: str, tree: Node) -> list[str]:
    """Warnings of commands that a comment, or a space behind a backslash, cuts before their end."""
    lines, warnings = text.splitlines(), []
    for number in range(1, len(lines)):
        before, line = lines[number - 1], lines[number]
        comment = line.lstrip().startswith("#") and before.endswith("\\") and not before.lstrip().startswith("#")
        space = re.search(r"[^\\]\\[ \t]+$", line) and not line.lstrip().startswith("#")
        if not comment and not space:
            continue
        node = tree.descendant_for_point_range((number, len(line) - len(line.lstrip())), (number, len(line)))
        if comment and (node is None or node.type != "comment"):
            continue
        start = next((n for n in range(number + 1, len(lines)) if not lines[n].lstrip().startswith("#")), len(lines))
        end = next((n for n in range(start, len(lines)) if not lines[n].endswith("\\")), len(lines) - 1)
        names = [match[1] for lost in lines[start : end + 1] if (match := ARGUMENT.match(lost))]
        if names:
            what = "a comment" if comment else "a space behind the backslash"
            warnings.append(
                f"line {number + 1}: {what} ends the command here; lines {start + 1} to {end + 1} are not passed to it "
                f"({', '.join(names)})"
            )
    return warnings
