"""The command ``lorabridge convert``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    CHECKPOINT_OUT,
    OUTPUT,
    NamedGiven,
    ShownGiven,
    StatedGiven,
    WrittenGiven,
    check_replicas_option,
    engine_options,
    fact_options,
    key_option,
    mappings_option,
    model_options,
    output_options,
    planned_options,
    progress_option,
    selection_options,
    step_option,
    strategy_option,
    table_options,
    told,
    written,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import (
    FACTS,
    LOCATION,
    Name,
    Naming,
    check_family,
    dialects,
    is_fact,
    is_tolerance_or_rank,
)

if TYPE_CHECKING:
    from ..actions.choices import ConvertOptions
    from ..actions.convert_report import ConvertReport, RoundingRow

    Action = Callable[..., ConvertReport]

COMPRESS_LOSSLESS = "1e-6"
"""What --compress without a value means: the smallest rank whose relative error stays below this."""

NOTES = 6
"""How many notes are printed without -v; a deep model has one for every layer."""


class Given(NamedGiven, StatedGiven, WrittenGiven, ShownGiven):
    """The options as click hands them over."""

    source_dialect: str | None
    target_dialect: str | None
    dtype: str | None
    on_overflow: str
    dequantize: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    layers: str | None
    compress: str | None
    adapter_only: bool
    base_name: str | None
    encrypt: str | None
    new_key_file: Path | None
    strategies: tuple[Path, ...]
    step: str | None
    check_replicas: bool
    engine: Literal["process", "ray"]
    address: str | None


@documented(
    Manual(
        arguments={
            "SRC": "A checkpoint file, a sharded set's index, or a directory (peft adapter, model).",
            "DST": CHECKPOINT_OUT,
        },
        groups={
            "From and to": ("source_dialect", "target_dialect", "family", "config", "layout", "mappings"),
            "What the source does not say": tuple(FACTS),
            "Selection": ("include", "exclude", "layers", "adapter_only"),
            "Numbers": ("dtype", "on_overflow", "dequantize", "compress"),
            "Writing": ("base_name", "max_shard_size", "crc", "workers", "dry_run", "overwrite"),
            "Encrypted checkpoints": ("key_file", "encrypt", "new_key_file"),
            "Ranks": ("strategies", "step", "check_replicas"),
            "Machines": ("engine", "address"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge convert peft_adapter/ out.ckpt",
            "lorabridge convert out.ckpt back/ --to peft",
            "lorabridge convert lora.pt out.ckpt --alpha 16 --enable-lora T,F,T",
            "lorabridge convert gpt2/ gpt2_ms/ --family gpt2 --dry-run",
        ),
        optional={
            "--compress": (is_tolerance_or_rank, COMPRESS_LOSSLESS),
            "--fan-in-fan-out": (is_fact("fan_in_fan_out"), "yes"),
        },
    )
)
@click.command("convert", cls=Command)
@click.argument("source", metavar="SRC", type=LOCATION)
@click.argument("target", metavar="DST")
@click.option(
    "--from",
    "source_dialect",
    cls=Naming,
    type=Name("dialect", dialects),
    metavar="DIALECT",
    help="Dialect of SRC, where detection is wrong or cannot decide: {names}; the last two are whole models.",
)
@click.option("--to", "--for", "target_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of DST; by default what DST's container calls for.")  # fmt: skip
@table_options(
    "adapter_config.json, the yaml of a MindFormers run, or the model's config.json, where it is not beside SRC.",
    family="Table of module names to go through; see `lorabridge tables list`.",
    example="qkv=grouped",
)
@mappings_option
@fact_options
@selection_options("Convert", "Do not convert")
@click.option("--layers", metavar="SET", help="Convert only these layers: 0-11, 0-11:2, 0,3,8-10.")
@click.option("--adapter-only", is_flag=True, help="Leave the base weights in a full checkpoint out.")
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors: fp32, fp16, bf16 ...; rounds once.")
@click.option("--on-overflow", type=click.Choice(["error", "saturate", "inf"]), default="error", show_default=True,
              help="What a cast does with values that are too large.")  # fmt: skip
@click.option("--dequantize", is_flag=True,
              help="Multiply float8 weights by the scales of their blocks (*_scale_inv): in float32, then bfloat16 or "
              "--dtype. The way back is not to float8.")  # fmt: skip
@click.option("--compress", metavar="[TOL|RANK]",
              help="Reduce ranks by SVD to a relative error or to a rank; alone, to 1e-6.")  # fmt: skip
@click.option("--base-name", metavar="NAME",
              help="What an adapter's config calls its base model: a hub name or a path.")  # fmt: skip
@model_options("Split the output: 5GB, 500MiB ...")
@key_option
@click.option("--encrypt", metavar="MODE", type=click.Choice(["aes-gcm", "aes-cbc", "sm4-cbc"]),
              help="Encrypt a .ckpt as MindSpore's enc_key does: aes-gcm, aes-cbc, sm4-cbc.")  # fmt: skip
@click.option("--new-key-file", metavar="FILE", type=LOCATION,
              help="Key to encrypt with, where it is not that of --key-file.")  # fmt: skip
@planned_options("DST")
@strategy_option()
@step_option
@check_replicas_option
@engine_options
@output_options
@progress_option
def convert(source: Path, target: str, **given: Unpack[Given]) -> None:
    """Convert an adapter or a checkpoint between PyTorch and MindSpore.

    Exact in both directions; all of DST appears or none of it. A statement about modules is VALUE for all of them or
    PATTERN=VALUE for those whose path matches the glob PATTERN, and may be repeated.
    """

    def action() -> Action:
        from ..actions.convert import convert as run

        return run

    conduct("convert", "converting", action, source, target, given)


def conduct(command: str, doing: str, action: Callable[[], Action], source: Path, target: str, given: Given) -> None:
    """Run what takes the options of a conversion, and print its report; ``action`` imports it once they are read."""
    out = Output(command, given["json"], given["quiet"], given["verbose"])
    check_family(given["family"], given["mappings"])
    options, run = _options(given), action()
    with Progress(doing, enabled=not (given["no_progress"] or given["quiet"])) as progress:
        done = run(source, target, options, progress=progress)
    if out.json:
        out.document(done.as_json())
        return
    show(out, done)


def _options(given: Given) -> ConvertOptions:
    from ..actions.choices import ConvertOptions
    from ..conversion.engines import Engine

    return ConvertOptions(
        **told(given), **written(given), source_dialect=given["source_dialect"],
        target_dialect=given["target_dialect"], dtype=given["dtype"], on_overflow=given["on_overflow"],
        dequantize=given["dequantize"], include=given["include"], exclude=given["exclude"], layers=given["layers"],
        compress=given["compress"], adapter_only=given["adapter_only"], base_name=given["base_name"],
        encrypt=given["encrypt"], new_key_file=given["new_key_file"],
        engine=Engine(given["engine"], given["address"]), strategies=given["strategies"], step=given["step"],
        check_replicas=given["check_replicas"],
    )  # fmt: skip


def show(out: Output, done: ConvertReport) -> None:
    """Print what a conversion did: one line, more with -v, and what the user must know."""
    out.wrote(done.summary(), done)
    if out.verbose:
        rows = [(m.path, m.kind, plain.number(m.rank), plain.number(m.alpha), plain.number(m.scaling), m.features)
                for m in done.modules]  # fmt: skip
        if rows:
            header = ("module", "kind", "rank", "alpha", "scaling", "")
            out.result(plain.table(header, rows, right="  rrr", width=width()))
        for line in _details(done):
            out.result(plain.escape(line))
    else:
        _count(out, done)
    if done.rounding:
        worst = max(done.rounding, key=lambda row: row.worst)
        out.warn([f"{plain.count(len(done.rounding), 'tensor')} rounded, at worst {_rounding(worst)}"])
        lost = sum(row.overflowed for row in done.rounding)
        if lost:
            out.warn([f"{plain.count(lost, 'value')} beyond the type's range became its largest or infinite"])
    if done.compressed:
        most = max(done.compressed, key=lambda row: row.error)
        said = (
            f"{plain.count(len(done.compressed), 'module')} compressed, the delta changes at most by {most.error:.1e}"
        )
        out.warn([f"{said} of its norm ({most.path})"])
    out.warn(done.warnings)
    notes = done.notes if out.verbose else done.notes[:NOTES]
    for note in notes:
        out.hint(note, label="note: ")
    if len(notes) < len(done.notes):
        out.hint(f"{len(done.notes) - len(notes)} more of this kind; -v lists them", label="note: ")
    if not done.dry_run:
        out.hint(f"lorabridge inspect {shlex.quote(done.target)}", label="next: ")


def _details(done: ConvertReport) -> list[str]:
    lines = [f"left out: {name} ({why})" for name, why in done.left_out]
    lines += [f"not selected: {name}" for name in done.unselected]
    for row in done.compressed:
        lines.append(f"compressed: {row.path}: rank {row.before} to {row.after}, relative error {row.error:.1e}")
    return lines + [f"rounded: {_rounding(row)}" for row in done.rounding]


def _rounding(row: RoundingRow) -> str:
    return f"{row.tensor}: {row.inexact} of {row.elements} elements, relative error up to {row.worst:.1e}"


def _count(out: Output, done: ConvertReport) -> None:
    left = [(len(done.left_out), "left out on purpose"), (len(done.unselected), "not selected")]
    parts = [f"{plain.count(number, 'tensor')} {what}" for number, what in left if number]
    if parts:
        out.hint(f"{', '.join(parts)}; -v lists them", label="note: ")
    if done.not_carried:
        out.hint(f"{plain.count(len(done.not_carried), 'file')} beside the source not carried: "
                 f"{', '.join(done.not_carried[:5])}", label="note: ")  # fmt: skip
