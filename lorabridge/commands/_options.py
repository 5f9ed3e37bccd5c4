"""Options that several commands share; the same word means the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

import click

from ._values import FACTS, LOCATION, Size, facts, matching_families, pairs

if TYPE_CHECKING:
    from ..dialects.adapter import Facts
    from ..distributed import told as ranks

F = TypeVar("F", bound=Callable[..., object])

OUTPUT = ("json", "quiet", "verbose", "no_progress")
CHECKPOINT_OUT = "A file, whose suffix decides the container (.safetensors, .bin/.pt, .ckpt), or a directory."
ADAPTER_OUT = "A directory, or a file whose suffix decides the container."
FACT_HELP = {
    "alpha": ("[PATTERN=]NUMBER", "The adapter's alpha (scaling is alpha / rank)."),
    "rank": ("[PATTERN=]R", "The adapter's rank."),
    "use_rslora": ("[PATTERN=]yes|no", "Whether scaling is alpha / sqrt(rank)."),
    "fan_in_fan_out": ("[PATTERN=][yes|no]", "Whether base weights are stored [in, out]; alone it means yes."),
    "enable_lora": ("[PATTERN=]T,F,T", "Which parts of a loralib MergedLinear are adapted."),
    "kernel_size": ("[PATTERN=]K[,K]", "Kernel size of convolutions."),
    "groups": ("[PATTERN=]G", "Groups of convolutions."),
    "out_features": ("[PATTERN=]N", "Length of the output axis."),
    "conv_form": ("[PATTERN=]peft|loralib", "Factorization that conv factors follow."),
    "kind": ("[PATTERN=]KIND", "linear, embedding, conv1d, conv2d or conv3d."),
    "merged": ("[PATTERN=]yes|no", "Whether the base weights already hold the delta."),
    "as": ("[PATTERN=]lora", "Write other kinds (LoHa, LoKr ...) as LoRA of the rank that it takes."),
    "names_of": ("NAME|PATH", "The model that flattened names belong to: sd15, sdxl ... or files."),
    "alpha_in": ("weights|config", "Where alpha goes: multiplied into B, or into the file's config."),
    "non_linearity": ("NAME", "The activation of bottleneck adapters, as MindSpore calls it."),
    "cell": ("PATH", "Where a MindSpore network has its PrefixEncoder or PromptTuning."),
}


class NamedGiven(TypedDict):
    """How modules are called, as click hands it over."""

    family: str | None
    config: Path | None
    layout: tuple[str, ...]
    mappings: Path | None


_AsGiven = TypedDict("_AsGiven", {"as": tuple[str, ...]})
"""The one field whose name Python keeps for itself."""


class StatedGiven(_AsGiven):
    """Statements about modules, as click hands them over."""

    alpha: tuple[str, ...]
    rank: tuple[str, ...]
    use_rslora: tuple[str, ...]
    fan_in_fan_out: tuple[str, ...]
    enable_lora: tuple[str, ...]
    kernel_size: tuple[str, ...]
    groups: tuple[str, ...]
    out_features: tuple[str, ...]
    conv_form: tuple[str, ...]
    kind: tuple[str, ...]
    merged: tuple[str, ...]
    names_of: tuple[str, ...]
    alpha_in: tuple[str, ...]
    non_linearity: tuple[str, ...]
    cell: tuple[str, ...]


class WrittenGiven(TypedDict):
    """How a checkpoint is written, as click hands it over."""

    max_shard_size: int | None
    crc: bool
    workers: int
    dry_run: bool
    overwrite: bool


class ShownGiven(TypedDict):
    """How a command speaks, as click hands it over."""

    json: bool
    quiet: bool
    verbose: bool
    no_progress: bool


def stated(given: StatedGiven) -> Facts:
    """Read every statement about modules; a BadParameter names the option that cannot be read."""
    texts: dict[str, tuple[str, ...]] = {
        "alpha": given["alpha"], "rank": given["rank"], "use_rslora": given["use_rslora"],
        "fan_in_fan_out": given["fan_in_fan_out"], "enable_lora": given["enable_lora"],
        "kernel_size": given["kernel_size"], "groups": given["groups"], "out_features": given["out_features"],
        "conv_form": given["conv_form"], "kind": given["kind"], "merged": given["merged"],
        "as": given["as"], "names_of": given["names_of"], "alpha_in": given["alpha_in"],
        "non_linearity": given["non_linearity"], "cell": given["cell"],
    }  # fmt: skip
    return facts(texts.items())


class _ToldGiven(NamedGiven, StatedGiven):
    """What is said of names and of modules, as click hands it over."""


class Told(TypedDict):
    """The same as the options of an action hold it (``actions.stated.Stated``)."""

    family: str | None
    config: Path | None
    layout: Mapping[str, str]
    mappings: Path | None
    facts: Facts


def told(given: _ToldGiven) -> Told:
    """Read what is said of names and of modules; a BadParameter names the option that cannot be read."""
    return {
        "family": given["family"],
        "config": given["config"],
        "layout": pairs(given["layout"], "--layout"),
        "mappings": given["mappings"],
        "facts": stated(given),
    }


def written(given: WrittenGiven) -> WrittenGiven:
    """Pick out how a checkpoint is written."""
    return {
        "max_shard_size": given["max_shard_size"],
        "crc": given["crc"],
        "workers": given["workers"],
        "dry_run": given["dry_run"],
        "overwrite": given["overwrite"],
    }


def output_options(command: F) -> F:
    """Add --json, -q and -v."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Say more: every module, every tensor left out."),
        click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only."),
        click.option("--json", "json", is_flag=True, help="Print one JSON document on stdout."),
    ):
        command = option(command)
    return command


def engine_options(command: F) -> F:
    """Add --engine and --address."""
    for option in (
        click.option("--address", metavar="ADDR", help="Of a Ray cluster: HOST:6379; auto; local to start one."),
        click.option("--engine", type=click.Choice(["process", "ray"]), default="process", show_default=True,
                     help="Who writes: threads of this process, or the machines of a Ray cluster that share its "
                     "file systems. The output does not depend on it."),
    ):  # fmt: skip
        command = option(command)
    return command


STRATEGY_HELP = "MindSpore's strategy file, once per stage, or a directory of them; by default strategy/ in or beside "


def strategy_option(option: str = "--strategy", name: str = "strategies", *, of: str = "SRC") -> Callable[[F], F]:
    """Add the strategy of one input that ranks wrote."""
    return click.option(option, name, metavar="FILE", multiple=True, type=LOCATION, help=f"{STRATEGY_HELP}{of}.")


def step_option(command: F) -> F:
    """Add --step for one input that ranks wrote."""
    return click.option("--step", metavar="STEP", help="Which checkpoint, where the ranks hold several: 2_1000.")(
        command
    )


def check_replicas_option(command: F) -> F:
    """Add --check-replicas for one input that ranks wrote."""
    return click.option("--check-replicas/--no-check-replicas", default=True, show_default=True,
                        help="Compare all copies of a slice before anything is written.")(command)  # fmt: skip


def ranks_options(**roles: str) -> Callable[[F], F]:
    """Add --strategy and --step to a command of several inputs, which are opened as they say while it runs.

    ``roles``: how the usage calls each input, and the parameter that holds its path or paths.
    """

    def add(command: F) -> F:
        @wraps(command)
        def run(*args: object, strategies: tuple[str, ...], steps: tuple[str, ...], **given: object) -> object:
            from ..distributed.told import using

            inputs = {role: _paths(given.get(parameter)) for role, parameter in roles.items()}
            with using(_told_of_ranks(strategies, steps, inputs)):
                return command(*args, **given)

        form = f"[{'|'.join(roles)}=]"
        for option in (
            click.option("--step", "steps", metavar=f"{form}STEP", multiple=True,
                         help="Which checkpoint, where ranks hold several: 2_1000."),
            click.option("--strategy", "strategies", metavar=f"{form}FILE", multiple=True,
                         help=f"{STRATEGY_HELP}the input."),
        ):  # fmt: skip
            run = option(run)
        return cast("F", run)

    return add


def _paths(value: object) -> tuple[Path, ...]:
    return (value,) if isinstance(value, Path) else value if isinstance(value, tuple) else ()


def _told_of_ranks(
    strategies: tuple[str, ...], steps: tuple[str, ...], inputs: Mapping[str, tuple[Path, ...]]
) -> ranks.Told:
    """Give every statement to the inputs that it is about; without a role, to those that ranks wrote."""
    from ..distributed.ranks import is_rank_directory
    from ..distributed.told import Told

    def about(text: str, option: str) -> tuple[str, list[Path]]:
        role, equals, value = text.partition("=")
        named = bool(equals) and role in inputs
        paths = [path for one, held in inputs.items() if not named or one == role for path in held]
        found = [path for path in paths if path.is_dir() and (option == "--step" or is_rank_directory(path))]
        if not found:
            whose = f"{role} is not" if named else "no input is"
            raise click.BadParameter(f"{text!r}: {whose} a directory that ranks wrote", param_hint=option)
        return value if named else text, found

    held: dict[Path, tuple[Path, ...]] = {}
    for text in strategies:
        file, paths = about(text, "--strategy")
        held |= {path: (*held.get(path, ()), LOCATION.convert(file, None, None)) for path in paths}
    which = {path: step for step, paths in (about(text, "--step") for text in steps) for path in paths}
    return Told(held, which)


def progress_option(command: F) -> F:
    """Add --no-progress."""
    return click.option("--no-progress", is_flag=True, help="Show no progress, not even on a terminal.")(command)


def facts_for(*fields: str) -> Callable[[F], F]:
    """Add an option for each of some statements about modules; with a pattern it counts for the matching paths only."""

    def add(command: F) -> F:
        for field in reversed(fields):
            metavar, text = FACT_HELP[field]
            name = "--" + field.replace("_", "-")
            command = click.option(name, field, multiple=True, metavar=metavar, help=text)(command)
        return command

    return add


fact_options = facts_for(*FACTS)
"""Every statement about modules."""


def writing_options(dry: str, replaced: str) -> Callable[[F], F]:
    """Add --workers, --dry-run and --overwrite. ``dry``: what a dry run does; ``replaced``: what is overwritten."""

    def add(command: F) -> F:
        for option in (
            click.option("--overwrite", is_flag=True, help=f"Replace {replaced}, in one step, if it exists."),
            click.option("-n", "--dry-run", is_flag=True, help=dry),
            click.option(
                "--workers", metavar="N", type=click.IntRange(min=0, max=256), default=0, envvar="LORABRIDGE_WORKERS",
                help="Threads; by default one per CPU, at most 8. The output does not depend on it.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return add


target_options = writing_options("Do everything but writing, and report.", "the output")
"""How a command writes whose work is done by a dry run too."""


def planned_options(target: str) -> Callable[[F], F]:
    """Add how a command writes that plans everything from headers."""
    return writing_options("Plan and report; write nothing.", target)


def model_options(split: str) -> Callable[[F], F]:
    """Add --max-shard-size, which ``split`` explains, and --crc."""

    def add(command: F) -> F:
        command = click.option("--crc", is_flag=True, help="Write MindSpore's CRC trailer into a .ckpt.")(command)
        return click.option("--max-shard-size", metavar="SIZE", type=Size(), help=split)(command)

    return add


def selection_options(only: str, never: str) -> Callable[[F], F]:
    """Add --include and --exclude; both say what happens to "what matches"."""

    def add(command: F) -> F:
        for name, said in (("--exclude", never), ("--include", f"{only} only")):
            said = f"{said} what matches. May be repeated."
            command = click.option(name, metavar="GLOB", multiple=True, help=said)(command)
        return command

    return add


def table_options(
    config: str, *, family: str = "Table of module names, where frameworks differ.", example: str | None = None
) -> Callable[[F], F]:
    """Add --family, --config and --layout. ``config``: what that file is; ``example``: a choice of a layout."""
    layout = "A choice that the table asks for."
    if example is not None:
        layout = f"A choice that a table asks for, such as {example}. May be repeated."

    def add(command: F) -> F:
        for option in (
            click.option("--layout", metavar="KEY=VALUE", multiple=True, help=layout),
            click.option("--config", metavar="FILE", type=LOCATION, help=config),
            click.option("--family", metavar="NAME", shell_complete=matching_families, help=family),
        ):
            command = option(command)
        return command

    return add


def keep_blas_single() -> None:
    """Keep BLAS, when numpy is loaded, from starting threads: lorabridge's own share the work already."""
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


def key_option(command: F) -> F:
    """Add --key-file: encrypted checkpoints are opened with its key while the command runs."""

    def use(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
        if value is not None and not context.resilient_parsing:
            from ..formats import keys

            context.with_resource(keys.using(keys.read_key(value)))

    return click.option(
        "--key-file", metavar="FILE", type=LOCATION, expose_value=False, callback=use,
        envvar="LORABRIDGE_KEY_FILE",
        help="Key of encrypted checkpoints; or set LORABRIDGE_KEY.",
    )(command)  # fmt: skip


def mappings_option(command: F) -> F:
    """Add --mappings."""
    return click.option(
        "--mappings",
        envvar="LORABRIDGE_MAPPINGS",
        metavar="DIR",
        type=LOCATION,
        help="Directory with family tables of your own.",
    )(command)
