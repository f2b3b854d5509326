"""Commands for files of other frameworks: their configurations and logs in, tuned values back out."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_autotune.cli import running
from grpo_autotune.cli.app import Json, command
from grpo_autotune.console import output_aside, say, show
from grpo_autotune.errors import ConfigError

From = Annotated[
    str | None, typer.Option("--from", metavar="NAME", help="The framework, where the file does not show it.")
]
Version = Annotated[
    str | None, typer.Option("--source-version", metavar="V", help="Its version, which decides the defaults.")
]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="K=V", help="A variable of the script, or an argument by number.")
]


@command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration, a script, a notebook, or a log.")],
    from_: From = None,
    version: Version = None,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", metavar="N", min=1, help="Training processes here; by default as in the file."),
    ] = None,
    env: Env = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The YAML to write (a new ./grpo.yaml); of a log, JSON or .html."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a setting changes meaning or is lost.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Also run a short real trial of the result.")] = False,
    against: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Of a log, the configuration to check it against.")
    ] = None,
    json_: Json = False,
) -> int:
    """Import a configuration or a log of verl, EasyR1, ms-swift, TRL, open-r1, VLM-R1, R1-V or Unsloth."""
    from grpo_autotune.files import is_file, refusal_told
    from grpo_autotune.interop.logs.steps import is_log

    with refusal_told():
        is_training = is_file(file) and is_log(file)
        if out is not None and file.exists() and out.exists() and out.samefile(file):
            raise ConfigError("this is the file to import", where=f"--out {out}", fix="Name another one.")
    how: Any = {"framework": from_, "version": version, "environment": environment(env), "world_size": world_size}
    of_config: dict[str, Any] = {"--from": from_, "--source-version": version, "--env": env}
    of_config["--world-size"] = world_size
    of_log = {"--strict": strict, "--probe": probe, **({} if against else of_config)}
    idle: dict[str, Any] = of_log if is_training else {"--config": against}
    for option in (option for option, value in idle.items() if value):
        what = f"{file.name} is a {'log' if is_training else 'configuration'}, which {option} does nothing for"
        raise ConfigError(what, where=option, fix="It goes with --config." if option in of_config else None)
    if is_training:
        from grpo_autotune.commands.interop.config import import_log

        return import_log(file, out=out, config=against, as_json=json_, **(how if against else {}))
    from grpo_autotune.commands.interop.config import import_config
    from grpo_autotune.config.batch import world_size as processes

    how |= {"world_size": world_size or (processes() if probe else None), "strict": strict}
    with output_aside() if probe and json_ else nullcontext():
        imported = import_config(file, **how, out=out, as_json=json_ and not probe)
    if imported is None:
        return 1
    return probed(str(out or "grpo.yaml"), imported.source, as_json=json_) if probe else 0


@command()
def export(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="A tuned.yaml of `search`.")],
    to: Annotated[Path, typer.Option("--to", metavar="ORIGINAL", help="The file that was imported; it is only read.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File to write; by default standard output.")
    ] = None,
    from_: From = None,
    version: Version = None,
    env: Env = None,
    world_size: Annotated[
        int | None, typer.Option("--world-size", metavar="N", min=1, help="Processes that it was tuned on.")
    ] = None,
    json_: Json = False,
) -> int:
    """Write the values that a search tuned into a copy of the file that the run was imported from."""
    from grpo_autotune.commands.interop.config import export_tuned

    how: Any = {"framework": from_, "version": version, "environment": environment(env)}
    return export_tuned(tuned, to, out=out, world_size=world_size, as_json=json_, **how)


def probed(config: str, framework: str, *, as_json: bool) -> int:
    """Probe an imported configuration, and say how the source's timers split; the exit code."""
    code = running.probe(config, json_=as_json)
    from grpo_autotune.config.schema import load_config
    from grpo_autotune.render.imported import split_lines
    from grpo_autotune.report.files import load_report

    for line in split_lines(load_report(load_config(config).run_dir / "probe"), framework):
        (say if as_json else show)(line)
    return code


def environment(items: list[str] | None) -> dict[str, str]:
    """Variables given as `K=V`; ConfigError for another form."""
    pairs = [item.partition("=") for item in items or []]
    for name, equals, _ in pairs:
        if not equals or not (name.isidentifier() or name.isdecimal()):
            raise ConfigError("not of the form NAME=VALUE", where=f"--env {name}", fix="Example: --env NNODES=1.")
    return {name: value for name, _, value in pairs}
