"""An argument of a Python script's or notebook's calls given another value: every way to do it."""

import ast
import json
import re
from collections.abc import Iterator

from grpo_autotune.interop.writing.shell_edits import replaced

CONFIG = re.compile(r"\w*(Config|Arguments)")  # calls that a missing argument may be added to


def python_edits(text: str, key: str, value: str) -> Iterator[str]:
    """Texts of the script with the argument set, the literal in the call or behind the name in it, else added."""
    data, lines = text.encode(), [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return

    def span(node: ast.expr) -> tuple[int, int]:
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
        return lines[node.lineno - 1] + node.col_offset, lines[end_line - 1] + end_column

    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for given in [word.value for call in calls for word in call.keywords if word.arg == key]:
        if isinstance(given, ast.Name):
            for node in nodes:
                if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [given.id]:
                    yield replaced(data, span(node.value), value)
        yield replaced(data, span(given), value)
    for call in calls:
        if call.keywords and CONFIG.fullmatch(ast.unparse(call.func).rpartition(".")[2]):
            first = call.keywords[0]
            start = lines[first.lineno - 1] + first.col_offset
            pad = f"\n{' ' * first.col_offset}" if first.lineno > call.lineno else " "
            yield replaced(data, (start, start), f"{key}={value},{pad}")


def notebook_edits(text: str, key: str, value: str) -> Iterator[str]:
    """The same for a notebook, cell by cell."""
    for number, cell in enumerate(json.loads(text)["cells"]):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            kept = re.sub(r"(?m)^(\s*)([!%?])(.*)$", r"\1pass  # \2\3", source)
            for edited in python_edits(kept, key, value):
                notebook = json.loads(text)
                notebook["cells"][number]["source"] = re.sub(r"(?m)^(\s*)pass  # ([!%?].*)$", r"\1\2", edited)
                yield json.dumps(notebook, indent=1, ensure_ascii=False)


def code_of(text: str) -> str:
    """The code of a notebook, cell below cell."""
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
