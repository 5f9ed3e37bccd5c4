"""Depth *model*: the whole network in both frameworks, the same tokens, outputs compared position by position."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .. import frameworks
from ..arithmetic.floats import Bits, Numbers, rounded
from ..arithmetic.numerics import Notes, kernels
from ..axes import Expr, Read, evaluate
from ..conversion.repository import ADAPTER_CONFIG
from ..dialects.adapter import Adapter, Extra, Facts
from ..dialects.loralib_ms import LoralibMs
from ..dtypes import BY_NAME, DType
from ..errors import MappingError, UsageError
from ..families import tables
from . import verify_outputs as outputs
from . import verify_torch
from .sides import Side, numbers_of
from .verify_architecture import batches
from .verify_case import Case, Progress
from .verify_inputs import VerifyOptions, described
from .verify_report import Check, DepthResult, ModuleRow
from .verify_setup import Half, Setup, is_peft, one_line, prepare, refusal
from .verify_tensors import meter
from .verify_torch import Array, Batch, Outputs, TorchNetwork

if TYPE_CHECKING:
    from ..layers.running import AdaptedCell, Loaded

__all__ = ["refusal", "verify_model"]

PASSES = 6
"""Parts of the work that progress counts, each about one pass over the weights."""

BEYOND = 10.0
"""An adapter's effect below so many bounds is too small for this depth to prove its names."""


def verify_model(case: Case, options: VerifyOptions, progress: Progress | None = None) -> DepthResult:
    """Run the network of the model's config in torch and in MindSpore and compare every block and the outputs.

    torch's side is transformers, loading its own files, with peft for a peft adapter. MindSpore's side is the
    reference network of :mod:`lorabridge.layers.models` with the parameters under the names that the checkpoint has.
    ``options.seed`` chooses the tokens. Refused where a network does not follow its config, or where files and config
    do not belong together; InputError where transformers cannot read them.
    """
    started = time.perf_counter()
    setup = prepare(case)
    weight = described(setup.torch.weights).nbytes
    step = meter("model", PASSES * weight, progress)
    given = batches(setup.config, options.seed)
    with frameworks.exact_arithmetic("torch", "mindspore"):
        try:
            network = _torch_base(setup)
            step(weight)
            loaded, checks = _mindspore(setup, network)
            step(weight)
            runs, bare, said = _torch_runs(setup, network, given)
        except (MappingError, UsageError) as error:
            return DepthResult("model", "refused", one_line(error))
        step(2 * weight)
        ours = _run_mindspore(loaded, given, network.blocks(), runs[0][0])
        step(2 * weight)
    checks = [*said, *checks, *_shapes(runs[0], ours)]
    rows: list[ModuleRow] = []
    proved = [_which(setup)]
    if checks[-1].ok:
        sites = list(_sites(given, network.blocks(), loaded.blocks(), (*runs, ours)))
        rows = [row for site in sites for row in outputs.rows(site)]
        checks += [outputs.top_check(site) for site in sites if site.kind == "logits"]
        proved += _proved(setup, given, bare, sites)
    return DepthResult(
        "model", "run", proved=tuple(proved), checks=tuple(checks), modules=tuple(rows),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _torch_runs(
    setup: Setup, network: TorchNetwork, given: Sequence[Batch]
) -> tuple[tuple[list[Outputs], list[Outputs]], list[Outputs], list[Check]]:
    """Return torch's outputs in float64 and in float32, those of the bare model in float32, and checks."""
    paths = network.blocks()
    bare = verify_torch.run(network, given, ()) if setup.torch.adapter is not None else []
    checks = _attach(setup, network)
    plain = verify_torch.run(network, given, paths)
    verify_torch.widen(network)
    _add(setup, network)
    return (verify_torch.run(network, given, paths), plain), bare, checks


def _run_mindspore(
    loaded: Loaded, given: Sequence[Batch], paths: Sequence[str], like: Outputs
) -> list[Outputs]:  # fmt: skip
    """Return MindSpore's outputs under torch's names: blocks by their number, then the network's own."""
    from ..layers import running

    finals = [name for name in like if name not in paths]
    found: list[Outputs] = []
    for batch in given:
        blocks, own = running.run(loaded, batch.ids, batch.mask, batch.types)
        outs = dict(zip(paths, blocks.values(), strict=False))
        found.append({**outs, **dict(zip(finals, own, strict=False))})
    return found


def _shapes(theirs: Sequence[Outputs], ours: Sequence[Outputs]) -> list[Check]:
    wrong = [
        f"{name}: {list(value.shape)} in torch, {list(mine[name].shape) if name in mine else 'nothing'} in MindSpore"
        for other, mine in zip(theirs, ours, strict=True)
        for name, value in other.items()
        if name not in mine or mine[name].shape != value.shape
    ]
    return [Check("both networks have the same outputs", not wrong, "", tuple(dict.fromkeys(wrong)))]


def _sites(
    given: Sequence[Batch], paths: Sequence[str], cells: Sequence[str], runs: tuple[Sequence[Outputs], ...]
) -> Iterator[outputs.Site]:
    """Yield every block, then the network's own outputs."""
    kept = [np.ones(batch.ids.shape, bool) if batch.mask is None else batch.mask.astype(bool) for batch in given]
    names = dict(zip(paths, cells, strict=True))
    for name in runs[0][0]:
        arrays: tuple[list[Numbers], ...] = tuple([np.asarray(out[name], np.float64) for out in run] for run in runs)
        kind = "block" if name in names else "logits" if name == "logits" else "hidden"
        yield outputs.gather(kept, names.get(name, name), name if name in names else "", kind, arrays)


def _which(setup: Setup) -> str:
    coarse = ""
    if setup.rounded is not None:
        half, dtype = setup.rounded
        role = (half.holder or half.weights).role
        coarse = f"; the numbers of {role} are rounded to {dtype.name} first, as the other's are"
    return (
        f"{setup.architecture.name} of transformers and the reference network in MindSpore, both in float32; the bound "
        f"is measured: what torch's float32 result is away from its float64 result{coarse}"
    )


def _proved(
    setup: Setup, given: Sequence[Batch], bare: Sequence[Outputs], sites: Sequence[outputs.Site]
) -> Iterator[str]:
    """Yield what the run established, and whether the adapter could be seen at all."""
    final = next(site for site in sites if site.kind != "block")
    count = sum(len(batch.ids) for batch in given)
    blocks = sum(site.kind == "block" for site in sites)
    yield (
        f"{blocks} blocks and the {final.path} agree on {count} random sequences, {len(final.sequence)} positions "
        f"without padding, each number within {final.allowed()[0]:.2g} at the {final.path}"
    )
    if not bare:
        return
    only = [{final.path: out[final.path]} for out in bare]
    without = next(_sites(given, (), (), (only, only, only)))
    effect = float(np.abs(without.exact - final.torch).max())
    if effect < BEYOND * final.allowed()[0]:
        yield f"the adapter changes the {final.path} by {effect:.2g} at most, too little to prove its names and alphas"
    else:
        yield f"the adapter changes the {final.path} by up to {effect:.2g}, {effect / final.allowed()[0]:.2g} bounds"


def _torch_base(setup: Setup) -> TorchNetwork:
    """Load the torch side's weights, without the adapter."""
    opened, name = setup.torch.weights, setup.architecture.name
    path = opened.given.path
    if opened.dialect.framework == "torch" and (path.is_dir() or path.name.endswith(".index.json")):
        network = verify_torch.load(setup.config, name, path)
        dtype = setup.rounding(setup.torch)
        if dtype is not None and setup.torch.adapter is None:
            verify_torch.round_values(network, dtype.name)
    else:
        network = verify_torch.load(setup.config, name, _named_values(setup, setup.torch, "hf"))
    beside = {extra.name for extra in setup.torch.adapter.extras} if setup.torch.adapter else set()
    lost = [name for name in network.missing if name not in beside]
    if lost:
        raise MappingError(
            f"the model's files do not give {len(lost)} parameters of {name}", where=lost,
            hint="check that the config.json belongs to the weights",
        )  # fmt: skip
    return network


def _named_values(setup: Setup, half: Half, side: Literal["hf", "ms"]) -> dict[str, Array]:
    """Return a whole model's float parameters by the names of one side."""
    opened, adapter = half.weights, half.weights.adapter
    dtype = setup.rounding(half) if half.adapter is None else None
    framework = "torch" if side == "hf" else "mindspore"
    if opened.dialect.framework != framework:
        adapter = tables.map_adapter(
            setup.table, adapter, to=side, layout=setup.layout,
            sizes=tables.sizes_from_config(setup.table, setup.config),
        )  # fmt: skip
    return {
        extra.name: _numbers(extra.value, opened, dtype)
        for extra in adapter.extras
        if extra.value.dtype.kind == "float"
    }


def _attach(setup: Setup, network: TorchNetwork) -> list[Check]:
    """Put the adapter on the torch network: with peft where it is a peft adapter, else merged."""
    half = setup.torch
    if half.adapter is None or half.holder is None:
        return []
    if not is_peft(half):
        _add(setup, network)
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = _peft_folder(half.holder, Path(name), setup.rounding(half))
        missing = verify_torch.attach_peft(network, folder)
    return [Check("peft finds every parameter of its adapter", not missing, "; ".join(missing)[:500])]


def _peft_folder(holder: Side, scratch: Path, dtype: DType | None) -> Path:
    """Return the adapter's directory as peft reads it.

    A lone file gets one with the config that belongs to it, and so do numbers that are to be rounded.
    """
    path = holder.given.path
    if path.is_dir() and dtype is None:
        return path
    config = {"peft_type": "LORA", **(holder.given.adapter_config or {})}
    (scratch / ADAPTER_CONFIG).write_text(json.dumps(config), "utf-8")
    if dtype is not None:
        from safetensors.numpy import save_file

        exprs = {name: Read(name, spec.dtype, spec.shape) for name, spec in holder.source.specs.items()}
        save_file(
            {name: _numbers(expr, holder, dtype) for name, expr in exprs.items() if expr.dtype.kind == "float"},
            scratch / "adapter_model.safetensors",
        )  # fmt: skip
    else:
        suffix = ".safetensors" if holder.source.format == "safetensors" else ".bin"
        os.symlink(holder.source.path.resolve(), scratch / f"adapter_model{suffix}")
    return scratch


def _numbers(expr: Expr, holder: Side, dtype: DType | None) -> Array:
    """Return numbers of a file in float32, rounded to a coarser type first where there is one."""
    exact = numbers_of(expr, holder.source)
    return (exact if dtype is None else rounded(exact, dtype)).astype(np.float32)


def _add(setup: Setup, network: TorchNetwork) -> None:
    """Add the deltas of an adapter that is not peft's to the weights, and set what it holds beside them."""
    half = setup.torch
    if half.adapter is None or half.holder is None or is_peft(half):
        return
    holder, dtype = half.holder, setup.rounding(half)
    deltas: dict[str, Array] = {}
    for module in half.adapter.modules:
        total: Numbers | None = None
        for term in module.terms:
            a, b = (_numbers(factor, holder, dtype).astype(np.float64) for factor in (term.a, term.b))
            total = np.zeros((module.out, a.shape[1])) if total is None else total
            total[term.start : term.stop] += module.scaling.value * (b @ a)
        if total is not None:
            deltas[module.path] = total
    beside = [extra for extra in half.adapter.extras if extra.kind != "base"]
    verify_torch.set_values(network, {extra.name: _numbers(extra.value, holder, dtype) for extra in beside})
    verify_torch.add_deltas(network, deltas)


def _mindspore(setup: Setup, network: TorchNetwork) -> tuple[Loaded, list[Check]]:
    """Build MindSpore's network and load it: own weights under their own names, else the torch network's, mapped."""
    from ..layers import running

    half = setup.mindspore
    native = half.weights.dialect.framework == "mindspore"
    base = _named_values(setup, half, "ms") if native else _from_torch(setup, network)
    cells, values, dialect = _spelled(setup, half)
    loaded = running.load(setup.ms_config, setup.architecture.name, base, cells, values, dialect=dialect)
    role = (half.holder or half.weights).role
    return loaded, [
        Check("every parameter of the MindSpore network has its value", not loaded.missing, "", loaded.missing),
        Check(f"every tensor of {role} has its place in it", not loaded.unexpected, "", loaded.unexpected),
    ]


def _from_torch(setup: Setup, network: TorchNetwork) -> dict[str, Array]:
    """Return the torch network's parameters by their MindSpore names, through the family table."""
    weights = {name: value for name, value in network.weights().items() if value.dtype.kind == "f"}
    extras = []
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        extras.append(Extra(path, leaf, Read(name, BY_NAME["float32"], value.shape), "base"))
    mapped = tables.map_adapter(
        setup.table, Adapter((), tuple(extras)), to="ms", layout=setup.layout,
        sizes=tables.sizes_from_config(setup.table, setup.config),
    )  # fmt: skip

    def read(name: str) -> Bits:
        return np.ascontiguousarray(weights[name], np.float32).view(np.uint32)

    known = kernels("", Notes(), {})
    return {
        extra.name: evaluate(extra.value, read, known).view(np.float32).reshape(extra.value.shape)
        for extra in mapped.extras
    }


def _spelled(setup: Setup, half: Half) -> tuple[list[AdaptedCell], dict[str, Array], Literal["loralib-ms", "mindpet"]]:
    """Return an adapter's cells, its tensors by the names of its MindSpore dialect, and that dialect."""
    from ..layers.running import AdaptedCell

    if half.adapter is None or half.holder is None:
        return [], {}, "loralib-ms"
    native = half.holder.dialect.framework == "mindspore"
    dialect = half.holder.dialect if native else LoralibMs()
    written = dialect.write(half.adapter, Facts())
    cells = []
    for module in written.modules:
        enable = written.facts.get(module.path, "enable_lora")
        r, scaling = module.terms[0].rank, module.scaling
        cells.append(
            AdaptedCell(
                module.path, r, scaling.alpha if scaling.rank == r else scaling.value * r,
                rslora=scaling.rslora and scaling.rank == r, dora=module.magnitude is not None,
                bias=module.lora_bias is not None,
                enable=tuple(bool(on) for on in enable) if isinstance(enable, list) else (),
            )
        )  # fmt: skip
    values: dict[str, Array] = {
        name: _numbers(expr, half.holder, setup.rounding(half)) for name, expr in written.tensors
    }
    return cells, values, "mindpet" if dialect.name == "mindpet" else "loralib-ms"
