"""The `output` section."""

from grpo_autotune.config.sections.section import Section


class OutputSection(Section):
    """The folder of a run."""

    dir: str | None = None
    """Run folder; `runs/<name>` by default."""
    name: str | None = None
    """Name of the run; the configuration file's name by default."""
