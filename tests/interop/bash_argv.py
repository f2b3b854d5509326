"""The argument lists that bash itself gives to the programs of a script: every program is a stand-in that only writes
down its arguments, and no other command can be reached."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAMS = (
    "python", "python3", "torchrun", "accelerate", "deepspeed", "swift", "megatron", "trl", "uv", "ray", "nohup",
    "srun",
)  # fmt: skip
STAND_IN = """#!{bash}
[ "$1" = -c ] && exit 1
printf '%s\\0' "${{0##*/}}" "$@" >> "$ARGV_LOG"
printf '\\1\\0' >> "$ARGV_LOG"
"""
UNSAFE = re.compile(r"/usr/|/bin/(?!bash|env)|\bssh\b|\bkill|>\s*/|exec \d|/dev/tcp")


def argv_of_bash(script: Path, folder: Path, environment: dict[str, str], arguments: list[str]) -> list[list[str]]:
    """Words of each command that bash starts, the program's name first; `folder` is empty and is the working folder."""
    programs = folder / "programs"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        place = programs / name
        place.write_text(STAND_IN.format(bash="/bin/bash"))
        place.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    log = folder / "argv"
    log.touch()
    outside = {"PATH": str(programs), "HOME": "~", "ARGV_LOG": str(log), **environment}
    outside["BASH_FUNC_command_not_found_handle%%"] = "() { return 0; }"
    subprocess.run(
        ["/bin/bash", str(script.absolute()), *arguments], cwd=work, env=outside, timeout=20, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    commands: list[list[str]] = [[]]
    for word in log.read_text().split("\0")[:-1]:
        if word == "\1":
            commands.append([])
        else:
            commands[-1].append(word)
    spaces = " "  # of a backslash before a space, which is no argument to anybody
    return [[word.replace(str(work), ".") for word in words if word != spaces] for words in commands[:-1]]


UNKNOWN = re.compile(r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`|\$\{?\w+[^}\s]*\}?", re.DOTALL)
"""What is kept as text, for only a run can tell it."""


def agrees(ours: list[str], theirs: list[str]) -> bool:
    """True if the words are the same, whatever stands in the place of what is unknown."""
    if not ours or not theirs:
        return all(UNKNOWN.fullmatch(word) for word in ours) and not theirs
    start, pattern = 0, ""
    for match in UNKNOWN.finditer(ours[0]):
        pattern += re.escape(ours[0][start : match.start()]) + ".*"
        start = match.end()
    pattern += re.escape(ours[0][start:])
    if re.fullmatch(pattern, theirs[0], re.DOTALL) and agrees(ours[1:], theirs[1:]):
        return True
    return bool(UNKNOWN.fullmatch(ours[0])) and agrees(ours[1:], theirs)


def main() -> None:
    """Compare the scripts named on the command line."""
    import tempfile

    from grpo_autotune.interop.reading.shell import evaluate

    sys.setrecursionlimit(5000)
    same = skipped = 0
    lines = []
    for name in sys.argv[1:]:
        path = Path(name)
        text = path.read_text()
        if UNSAFE.search(text.partition("\n")[2]):
            skipped += 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            theirs = argv_of_bash(path, Path(folder), {}, [])
        ours = [[word.text for word in command.words] for command in evaluate(text, path.name).commands]
        ours = [words for words in ours if words[0] in PROGRAMS and words[1:2] != ["-c"]]
        if not theirs:
            skipped += 1
            continue
        pairs = list(zip(sorted(ours), sorted(theirs), strict=False))
        if len(ours) == len(theirs) and all(agrees(*pair) for pair in pairs):
            same += 1
            continue
        lines.append(f"{name} {len(ours)} {len(theirs)}")
        for mine, bash in pairs:
            for left, right in zip(mine, bash, strict=False):
                if not agrees([left], [right]):
                    lines.append(f"   ours {json.dumps(left)} bash {json.dumps(right)}")
                    break
    sys.stdout.write("\n".join([*lines, f"{same} same, {skipped} skipped", ""]))


if __name__ == "__main__":
    main()
