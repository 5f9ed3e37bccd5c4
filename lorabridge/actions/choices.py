"""Decide what a conversion is: dialects, family, facts and place, from the source's headers and the options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from .. import dialects
from ..arithmetic.numerics import POLICIES
from ..conversion import read_facts
from ..conversion.engines import Engine
from ..conversion.forward import Settings, dialect_named
from ..conversion.repository import Framework, Input, Output, framework_of, plan_output
from ..conversion.selection import Selection
from ..dialects import PIPELINES
from ..dialects.adapter import OWN_ALPHA, Dialect, Fact, Facts
from ..dialects.deltas import COUNTERPARTS
from ..dialects.mindformers_config import states_alpha
from ..dtypes import ALIASES, BY_NAME, DType
from ..errors import InputError, MappingError, OutputError, UsageError
from ..formats import keys
from ..formats.encrypted import MAGICS, Encryption, Mode
from ..manifest import Manifest
from .stated import Stated


@dataclass(frozen=True, slots=True)
class ConvertOptions(Stated):
    """Everything a conversion can be told; see ``lorabridge convert --help`` for the meaning of each.

    ``base_name`` is what an adapter is to call its base model. ``encrypt`` uses the key that is in use
    (``formats.keys``), or that of ``new_key_file``.
    """

    source_dialect: str | None = None
    target_dialect: str | None = None
    dtype: str | None = None
    on_overflow: str = "error"
    dequantize: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str | None = None
    compress: str | None = None
    adapter_only: bool = False
    max_shard_size: int | None = None
    crc: bool = False
    base_name: str | None = None
    encrypt: str | None = None
    new_key_file: Path | None = None
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False
    strategies: tuple[Path, ...] = ()
    step: str | None = None
    check_replicas: bool = True
    engine: Engine = field(default_factory=Engine)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided, with the manifest if it describes the source.

    ``family``: None where none was asked for and none is known from the manifest. ``facts`` are about the source;
    ``chosen`` are for the target: an alpha or a rank that a flag states is the source's, unless the source has its own.
    """

    origin: Dialect
    goal: Dialect
    family: str | None
    output: Output
    kept: Manifest | None
    facts: Facts
    chosen: Facts
    warnings: tuple[str, ...]

    @property
    def crosses(self) -> bool:
        """The conversion goes from one project's names to another's."""
        return dialects.naming(self.origin) != dialects.naming(self.goal)

    @property
    def whole_model(self) -> bool:
        """The target is a plain model, not an adapter."""
        return self.goal.name in ("hf", "ms")


def choose(given: Input, target: Path | str, options: ConvertOptions) -> Choice:
    """Decide; UsageError for options that contradict each other, OutputError for an impossible place."""
    _check_options(options)
    kept = given.manifest if given.manifest is not None and given.manifest.describes(given.source.specs) else None
    warnings: tuple[str, ...] = ()
    if given.manifest is not None and kept is None:
        warnings = ("the manifest beside describes other tensors and is ignored",)
    facts = options.facts.then(given.stated).then(kept.facts if kept else Facts())
    if options.adapter_only:
        facts = facts.then(Facts((Fact("*", "merged", False),)))  # the base stays behind: its state does not matter
    facts = read_facts.completed(facts, given.source)
    origin = source_dialect(given, kept, facts, options.source_dialect)
    own = (
        kept is not None
        or states_alpha(given.adapter_config)
        or "lora_parameters" in (given.adapter_config or {})
        or origin.name in OWN_ALPHA
    )
    chosen = tuple(f for f in options.facts.entries if own or f.field not in ("alpha", "rank"))
    goal = _target_dialect(origin, kept, target, options)
    family = options.family or (kept.named[0] if kept and dialects.naming(origin) != dialects.naming(goal) else None)
    output = plan_output(target, framework=goal.framework, adapter=goal.name not in ("hf", "ms"), dialect=goal.name)
    if goal.name in PIPELINES and output.format != "safetensors" and options.facts.get("*", "alpha_in") is None:
        chosen = (*chosen, Fact("*", "alpha_in", "weights"))  # there is no other place for it
    if options.max_shard_size is not None and not output.directory:
        raise UsageError("--max-shard-size needs a directory", where=str(target), hint="end DST with a slash")
    _check_places(given, output)
    choice = Choice(origin, goal, family, output, kept, facts, Facts(chosen), warnings)
    if choice.crosses and origin.name in ("hf", "ms") and choice.whole_model and family is None:
        from ..families.pipelines import advice

        raise UsageError(
            "a full model needs a family table to be renamed",
            where=f"fitting families: {', '.join(families(given, origin, options)) or 'none'}",
            hint=advice(given.source.specs) or "pass --family NAME, or --family identity to keep every name",
        )
    return choice


def _check_options(options: ConvertOptions) -> None:
    """Refuse values that the command line would not let through."""
    if options.on_overflow not in POLICIES:
        raise UsageError(f"on_overflow {options.on_overflow!r} is none of {', '.join(POLICIES)}", hint="choose one")
    if options.on_overflow != "error" and options.dtype is None:
        raise UsageError("--on-overflow is about casts, and none is asked for", hint="add --dtype, or leave it out")
    if options.mappings is not None and not options.mappings.is_dir():
        raise InputError(
            "--mappings is not a directory", where=str(options.mappings), hint="name the tables' directory"
        )
    if options.workers < 0:
        raise UsageError(f"{options.workers} workers are too few", hint="give a positive number, or 0 for one per CPU")
    for name, patterns in (("include", options.include), ("exclude", options.exclude)):
        if isinstance(patterns, str):
            raise UsageError(f"{name} is one text", where=patterns, hint=f"give a tuple: {name}=({patterns!r},)")


def source_dialect(given: Input, kept: Manifest | None, facts: Facts, chosen: str | None) -> Dialect:
    """Return the dialect of a file: as told, as its manifest says, or the one that claims it, else a whole model's.

    Raises MappingError where several dialects claim it, UsageError where ``chosen`` names none.
    """
    if chosen:
        return dialect_named(chosen)
    if kept is not None:
        return dialect_named(kept.target.dialect)
    found = dialects.detect(given.content(facts))
    if len(found) > 1:
        raise MappingError(
            "the file fits several dialects",
            where=[f"{name}: {why}" for name, why in found],
            hint="choose one with --from",
        )
    if found:
        return dialect_named(found[0][0])
    mindspore = given.source.format == "mindspore" or given.source.metadata.get("format") == "ms"
    return dialect_named("ms" if mindspore else "hf")


def _target_dialect(
    origin: Dialect, kept: Manifest | None, target: Path | str, options: ConvertOptions
) -> Dialect:  # fmt: skip
    if options.target_dialect:
        goal = dialect_named(options.target_dialect)
        decided = framework_of(target)
        if decided is not None and decided != goal.framework:
            raise UsageError(
                f"dialect {goal.name!r} is spelled in {goal.framework} files",
                where=str(target),
                hint="give the target another suffix, or choose another dialect with --to",
            )
        return goal
    decided = framework_of(target)
    if kept is not None:
        back = _first_source(kept) if decided is None else dialect_named(kept.source.dialect)
        if decided in (None, back.framework):
            return back
    framework: Framework = decided or ("torch" if origin.framework == "mindspore" else "mindspore")
    if origin.framework == framework:
        return origin
    if origin.name in ("hf", "ms"):
        return dialect_named("ms" if framework == "mindspore" else "hf")
    if origin.name in COUNTERPARTS:
        return dialect_named(COUNTERPARTS[origin.name])
    return dialect_named("loralib-ms" if framework == "mindspore" else "peft")


def _first_source(kept: Manifest) -> Dialect:
    """Return the dialect to go back to by default: the first of the other framework, else the last one."""
    framework = dialect_named(kept.target.dialect).framework
    found = [dialect_named(step.source.dialect) for step in kept.chain()]
    return next((dialect for dialect in found if dialect.framework != framework), found[0])


def encryption(options: ConvertOptions) -> Encryption | None:
    """Return how the output is to be encrypted; InputError without a key that fits, UsageError for an unknown mode."""
    if options.encrypt is None:
        if options.new_key_file is not None:
            raise UsageError("--new-key-file is about encryption, and none is asked for", hint="add --encrypt MODE")
        return None
    if options.encrypt not in MAGICS:
        raise UsageError(f"unknown encryption {options.encrypt!r}", hint=f"known: {', '.join(MAGICS)}")
    if options.new_key_file is not None:
        key = keys.read_key(options.new_key_file)
    else:
        key = keys.needed("--encrypt needs a key", "")
    chosen = Encryption(cast(Mode, options.encrypt), key)
    chosen.check()
    return chosen


def families(given: Input, origin: Dialect, options: ConvertOptions) -> list[str]:
    """Return the families whose tables know every module of the source."""
    from .inspect import family_candidates

    return family_candidates(given, origin, mappings=options.mappings)


def settings_for(given: Input, choice: Choice, options: ConvertOptions) -> Settings:
    """Return what the forward plan depends on; layout choices of the manifest hold where none are given."""
    layout = dict(options.layout)
    named = None if choice.kept is None else choice.kept.named[0]
    if choice.kept is not None and choice.family in (None, named):
        layout = {**choice.kept.named[1], **layout}
    return Settings(
        family=choice.family or named or "identity",
        layout=layout,
        mappings=options.mappings,
        model_config=given.model_config,
        target_facts=choice.chosen,
        selection=Selection(options.include, options.exclude, options.layers),
        adapter_only=options.adapter_only,
        dtype=dtype_named(options.dtype) if options.dtype else None,
        on_overflow=options.on_overflow,
        dequantize=options.dequantize,
        base_name=options.base_name,
    )


def dtype_named(text: str) -> DType:
    """Return a floating-point type by its name or alias (fp16, bf16 ...)."""
    found = BY_NAME.get(ALIASES.get(text.lower(), text.lower()))
    if found is None or found.kind != "float":
        known = ", ".join(d.name for d in BY_NAME.values() if d.kind == "float")
        raise UsageError(f"unknown floating-point dtype {text!r}", hint=f"known: {known}")
    return found


def _check_places(given: Input, output: Output) -> None:
    target, source = output.target.resolve(), given.path.resolve()
    if target == source or source in target.parents:
        raise OutputError("the output lies on or inside the input", where=str(output.target), hint="write elsewhere")
