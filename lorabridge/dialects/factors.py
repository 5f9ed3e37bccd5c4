"""Factor algebra on headers: other factors with the same delta, without touching a value.

Everything here moves whole blocks (rows, columns, zeros) and is exact. Two functions need arithmetic and say so:
:func:`uniform`, where a scaling has to be folded into ``b``, and :func:`compress`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..axes import Compute, Expr, ShapeError, cut, join, reorder, reshape, scale, zeros
from ..dtypes import BY_NAME, DType, lossless
from ..errors import MappingError
from .adapter import Facts, LoraModule, Scaling, Term


def exact_alpha(value: float, rank: int) -> float | None:
    """Return the alpha with ``alpha / rank == value`` in doubles, the shortest in digits; None if none does."""
    if rank < 1 or not math.isfinite(value * rank):
        return None
    near = value * rank
    below, above = math.nextafter(near, -math.inf), math.nextafter(near, math.inf)
    fitting = [alpha for alpha in (float(round(near)), near, below, above) if alpha / rank == value]
    return min(fitting, key=lambda alpha: len(repr(alpha)), default=None)


def rescaled(module: LoraModule, rank: int) -> Scaling:
    """Return the scaling of the same value for another rank; MappingError where no alpha gives it exactly."""
    if rank == module.scaling.rank:
        return module.scaling
    alpha = exact_alpha(module.scaling.value, rank)
    if alpha is None:
        raise MappingError(
            f"no alpha gives the scaling {module.scaling.value!r} exactly at rank {rank}",
            where=module.path,
            hint=f"choose a power of two with --rank, for example {1 << max(rank - 1, 0).bit_length()}",
        )
    return Scaling(alpha, rank)


def plain_scaling(module: LoraModule) -> Scaling:
    """Return the scaling as ``alpha / rank``, for libraries that know no rank-stabilised form."""
    scaling = module.scaling
    if not scaling.rslora:
        return scaling
    alpha = exact_alpha(scaling.value, scaling.rank)
    if alpha is None:
        raise MappingError(
            f"rank-stabilised scaling {scaling.value!r} has no exact alpha / {scaling.rank}",
            where=module.path,
            hint="pad to a rank that is a power of two with --rank, or choose a dialect that knows rsLoRA",
        )
    return Scaling(alpha, scaling.rank)


def grow(module: LoraModule) -> LoraModule:
    """Make one term over all rows of several terms: ``a`` stacked, ``b`` block-placed in zeros, ranks added.

    Exact. Raises MappingError when the terms differ in element type or the scaling has no exact alpha at the new rank.
    """
    if module.plain:
        return module
    rank = sum(term.rank for term in module.terms)
    try:
        a = join([term.a for term in module.terms], 0)
        b = join([_placed(term, module.out) for term in module.terms], 1)
    except ShapeError as error:
        raise MappingError(
            f"blocks cannot be stacked: {error}", where=module.path, hint="give all factors one type with --dtype"
        ) from error
    return replace(module, terms=(Term(a, b, 0, module.out),), scaling=rescaled(module, rank))


def _placed(term: Term, out: int) -> Expr:
    above = zeros(term.b.dtype, (term.start, term.rank))
    below = zeros(term.b.dtype, (out - term.stop, term.rank))
    return join([above, term.b, below], 0)


def pad_rank(module: LoraModule, rank: int) -> LoraModule:
    """Raise every term's rank to ``rank`` with zero rows and columns; the scaling's value stays.

    For conv factors in loralib's form ``rank`` counts as loralib does (``a`` has ``rank * k`` rows). Raises
    MappingError when a term has a higher rank, or groups do not divide the new one.
    """
    width = rank * (_side(module) if module.conv_form == "loralib" else 1)
    return replace(module, terms=_padded(module, width), scaling=rescaled(module, rank))


def _padded(module: LoraModule, rank: int) -> tuple[Term, ...]:
    high = max(term.rank for term in module.terms)
    if high > rank:
        raise MappingError(
            f"rank {high} does not fit rank {rank}",
            where=module.path,
            hint="choose a higher --rank, or shrink the factors with --compress",
        )
    groups = module.groups if module.conv_form == "peft" else 1
    if rank % groups:
        raise MappingError(
            f"{groups} groups do not divide rank {rank}", where=module.path, hint="choose another --rank"
        )
    return tuple(_filled(term, rank, groups) for term in module.terms)


def _filled(term: Term, rank: int, groups: int) -> Term:
    """Add zeros at the end of each group's share of the rank."""
    share, new = term.rank // groups, rank // groups
    fill = zeros(term.a.dtype, (new - share, *term.a.shape[1:]))
    a = join([part for g in range(groups) for part in (cut(term.a, 0, g * share, (g + 1) * share), fill)], 0)
    b = join([term.b, zeros(term.b.dtype, (term.b.shape[0], new - share, *term.b.shape[2:]))], 1)
    return Term(a, b, term.start, term.stop)


def uniform(
    modules: Sequence[LoraModule], *, rank: int | None = None, alpha: float | None = None
) -> tuple[tuple[LoraModule, ...], int, float, tuple[str, ...]]:
    """Give all modules one rank and one alpha: (modules, rank, alpha, notes).

    Ranks are padded with zeros. Where a scaling differs from ``alpha / rank`` the ratio goes into ``b``: exactly
    when it is a power of two, otherwise rounded once in at least float32, which a note says. Without ``alpha`` the
    one is taken that leaves most modules as they are, integers first. Raises MappingError for a rank that is too
    small, a scaling that is not finite, and a zero scaling among others.
    """
    if not modules:
        return (), rank or 1, 1.0 if alpha is None else float(alpha), ()
    single = [_stacked(module) for module in modules]
    top = rank or max(module.terms[0].rank for module in single)
    values = [module.scaling.value for module in single]
    mixed = len(set(values)) > 1 or alpha is not None
    bad = [m.path for m, v in zip(single, values, strict=True) if not math.isfinite(v) or (v == 0 and mixed)]
    if bad:
        raise MappingError(
            "a scaling of zero or infinity cannot be shared", where=bad, hint="leave these modules out with --exclude"
        )
    target = Scaling(_shared_alpha(values, top) if alpha is None else float(alpha), top)
    shares = [value / target.value if target.value else math.inf for value in values if value]
    if not math.isfinite(target.value) or not all(share and math.isfinite(share) for share in shares):
        raise MappingError(
            f"alpha {target.alpha!r} cannot share the scalings: a factor in B would vanish or be infinite",
            hint="choose another --alpha",
        )
    notes: Counter[str] = Counter()
    out = []
    for module, value in zip(single, values, strict=True):
        (term,) = _padded(module, top)
        b, note = _folded(term.b, value, target.value)
        notes.update([note] if note else [])
        out.append(replace(module, terms=(replace(term, b=b),), scaling=target))
    said = tuple(f"{note} ({count} module{'s' if count > 1 else ''})" for note, count in sorted(notes.items()))
    return tuple(out), top, target.alpha, said


def uniform_as_told(
    modules: Sequence[LoraModule], facts: Facts
) -> tuple[tuple[LoraModule, ...], int, float, tuple[str, ...]]:
    """Give all modules one rank and one alpha, those that ``facts`` state for ``*``; see :func:`uniform`."""
    rank, alpha = facts.get("*", "rank"), facts.get("*", "alpha")
    return uniform(
        modules,
        rank=rank if isinstance(rank, int) else None,
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
    )


def as_written(number: float) -> int | float:
    """Return a number as configs write it: without a decimal point where it is whole."""
    return int(number) if number == int(number) else number


def _shared_alpha(values: Sequence[float], rank: int) -> float:
    """Choose the alpha that rounds nothing, touches fewest modules and is an integer, in this order."""
    found = [(value, exact_alpha(value, rank)) for value in sorted(set(values))]

    def merit(choice: tuple[float, float]) -> tuple[int, int, bool, float]:
        value, alpha = choice
        exact = sum(v == value or _power_of_two(v, value) for v in values)
        return exact, values.count(value), alpha == int(alpha), -abs(alpha)

    usable = [(value, alpha) for value, alpha in found if alpha is not None]
    return max(usable, key=merit)[1] if usable else float(rank)


def _power_of_two(value: float, unit: float) -> bool:
    """Say whether value is unit times a power of two, exactly."""
    return unit != 0 and math.frexp(value)[0] == math.frexp(unit)[0]


def _folded(b: Expr, value: float, unit: float) -> tuple[Expr, str]:
    if value == unit:
        return b, ""
    ratio = value / unit
    if _power_of_two(value, unit):
        return scale(b, ratio, b.dtype), f"scaling {value:g} folded into B as the power of two {ratio:g}"
    wide = BY_NAME["float64" if b.dtype.name == "float64" else "float32"]
    return scale(b, ratio, wide), f"scaling {value:g} folded into B as the factor {ratio!r}, rounded once to {wide}"


def blocks(a: Expr, b: Expr, enable: Sequence[bool]) -> tuple[tuple[Term, ...], int]:
    """Split the factors of loralib's MergedLinear into (terms, out).

    Shapes: ``a`` ``[r * n, in]``, ``b`` ``[out // L * n, r]`` with L blocks of which n are enabled (loralib 0.1.2,
    ``MergedLinear.merge_AB``). Raises ShapeError when they do not divide.
    """
    count = sum(enable)
    if not count or a.shape[0] != b.shape[1] * count or b.shape[0] % count:
        raise ShapeError(f"shapes {a.shape} and {b.shape} are not {count} blocks")
    rank, rows = b.shape[1], b.shape[0] // count
    terms = []
    for i, block in enumerate(index for index, on in enumerate(enable) if on):
        part = (cut(a, 0, i * rank, (i + 1) * rank), cut(b, 0, i * rows, (i + 1) * rows))
        terms.append(Term(*part, block * rows, (block + 1) * rows))
    return tuple(terms), rows * len(enable)


def as_merged(module: LoraModule) -> tuple[Expr, Expr, tuple[bool, ...]]:
    """Return (a, b, enable_lora) as loralib's MergedLinear holds them; the inverse of :func:`blocks`.

    Raises MappingError unless all terms have one rank and lie on distinct blocks of equal length.
    """
    terms = sorted(module.terms, key=lambda term: term.start)
    rows, rank = terms[0].stop - terms[0].start, terms[0].rank
    starts = [term.start for term in terms]
    even = all(t.stop - t.start == rows and t.rank == rank and rows and t.start % rows == 0 for t in terms)
    if not even or module.out % rows or len(set(starts)) < len(starts):
        raise MappingError(
            "blocks of different length or rank are not a MergedLinear",
            where=module.path,
            hint="choose a dialect with plain factors, such as peft or loralib-ms",
        )
    try:
        a, b = join([term.a for term in terms], 0), join([term.b for term in terms], 0)
    except ShapeError as error:
        raise MappingError(f"blocks differ: {error}", where=module.path, hint="give one type with --dtype") from error
    return a, b, tuple(block * rows in starts for block in range(module.out // rows))


def _side(module: LoraModule) -> int:
    """Return the kernel's one side length; loralib knows no other kernels."""
    sizes = set(module.kernel_size)
    if len(sizes) != 1:
        raise MappingError(
            f"kernel {module.kernel_size or '?'} is not of one side length, as loralib's factorization needs",
            where=module.path,
            hint="choose a dialect with peft's conv factors (peft, or loralib-ms), or merge",
        )
    return sizes.pop()


def conv_to_peft(module: LoraModule) -> LoraModule:
    """Refactor loralib's conv delta as a convolution of full kernel size followed by a pointwise one; exact.

    loralib 0.1.2 adds ``(b @ a).view(out, in / groups, k, k)`` with ``a[r*k, in*k]``, ``b[out/groups*k, r*k]``. Read
    row by row, ``delta[o]`` is the concatenation over j < k/groups of ``b[o*k/groups + j] @ a``, which is row ``o`` of
    ``[b_0|b_1|...]`` times ``blockdiag(a, a, ...)``: rank ``r*k*k``. Each group has its own share of the rank, on its
    own input channels. In d dimensions (our MindSpore layers) ``b`` has ``k**(d-1)`` rows per output instead of k.
    Raises MappingError when groups do not divide them.
    """
    if module.conv_form == "peft" or not module.kind.startswith("conv"):
        return module
    side, groups, (term,) = _side(module), module.groups, module.terms
    dims = int(module.kind[4])
    if side ** (dims - 1) % groups:
        raise MappingError(
            f"loralib's {module.kind} factors (kernel {side}, {groups} groups) have no exact pair of conv factors",
            where=module.path,
            hint="merge it into the base first (loralib does on eval()), or keep loralib's form with --to loralib-ms",
        )
    spread, width = side ** (dims - 1) // groups, term.rank
    channels, kernel = term.a.shape[1] // side, (side,) * dims
    diagonal = _block_diagonal(term.a, spread)
    local = reshape(diagonal, (spread * width, channels // groups, *kernel))
    a = join([_on_channels(local, g, groups) for g in range(groups)], 0)
    b = reshape(term.b, (module.out, spread * width, *(1,) * dims))
    scaling = rescaled(module, a.shape[0])
    return replace(module, terms=(Term(a, b, 0, module.out),), scaling=scaling, conv_form="peft", kernel_size=kernel)


def _block_diagonal(a: Expr, count: int) -> Expr:
    rows, columns = a.shape
    bands = []
    for i in range(count):
        left, right = zeros(a.dtype, (rows, i * columns)), zeros(a.dtype, (rows, (count - 1 - i) * columns))
        bands.append(join([left, a, right], 1))
    return join(bands, 0)


def _on_channels(local: Expr, group: int, groups: int) -> Expr:
    def empty(count: int) -> Expr:
        return zeros(local.dtype, (local.shape[0], count * local.shape[1], *local.shape[2:]))

    return join([empty(group), local, empty(groups - 1 - group)], 1)


def conv_to_loralib(module: LoraModule, *, extended: bool = False) -> LoraModule:
    """Refactor peft's conv factors into loralib's form; exact, of the same rank in two dimensions.

    With ``a[r, in, k, k]`` and ``b[out, r, 1, 1]``: ``a'[(j, rho)] = a.reshape(r, k, in*k)[rho, j]`` and
    ``b'[o*k + i, (j, rho)] = (i == j) * b[o, rho]``. Raises MappingError for what loralib 0.1.2 cannot run: 1d and 3d
    kernels above 1 (its view fails; ``extended`` allows them, with ``k**(d-1)`` in the place of k, for our MindSpore
    layers), oblong kernels, and groups (its delta sees only a group's own channels).
    """
    if module.conv_form == "loralib" or not module.kind.startswith("conv"):
        return module
    side, dims = _side(module), int(module.kind[4])
    instead = "choose a dialect with peft's conv factors (peft, or loralib-ms), or merge"
    if side > 1 and dims != 2 and not extended:
        raise MappingError(
            f"loralib 0.1.2 itself fails on {module.kind} with kernel {side}", where=module.path, hint=instead
        )
    if module.groups > 1:
        raise MappingError(
            "peft's factors of a grouped convolution see all input channels, loralib's only their group's",
            where=module.path,
            hint=instead,
        )
    steps = side ** (dims - 1)
    whole = module.terms[0].rank
    (term,) = _padded(module, -(-whole // side) * side if dims == 1 else whole)  # a' has a multiple of k rows
    rank, columns = term.rank, math.prod(term.a.shape[1:]) // steps
    a = reshape(reorder(reshape(term.a, (rank, steps, columns)), (1, 0, 2)), (steps * rank, columns))
    flat = reshape(term.b, (module.out, rank))
    rows = [
        reshape(
            join([_empty_columns(flat, i), flat, _empty_columns(flat, steps - 1 - i)], 1), (module.out, 1, steps * rank)
        )
        for i in range(steps)
    ]
    b = reshape(join(rows, 1), (module.out * steps, steps * rank))
    scaling = rescaled(module, steps * rank // side)
    return replace(module, terms=(Term(a, b, 0, module.out),), scaling=scaling, conv_form="loralib")


def _empty_columns(x: Expr, count: int) -> Expr:
    return zeros(x.dtype, (x.shape[0], count * x.shape[1]))


def single_pair(module: LoraModule, dialect: str) -> LoraModule:
    """Return the module as one pair of factors in the conv form that a dialect writes."""
    forms = {"peft": conv_to_peft, "loralib": conv_to_loralib}
    return forms.get(dialect, lambda same: same)(grow(module))


def compress(module: LoraModule, rank: int, dtype: DType | None = None) -> LoraModule:
    """Replace the factors by the best ones of a lower rank (kernels ``compress_a`` and ``compress_b``).

    Best in the Frobenius norm of the delta: thin QR of both factors, SVD of the small core (Eckart and Young 1936).
    loralib's conv factors keep their form, so their rank is rounded up to a multiple of the kernel side. The factors
    keep their type, or get ``dtype`` at once where that is wider.
    """
    module = grow(module)
    refuse_grouped((module,))
    (term,) = module.terms
    side = _side(module) if module.conv_form == "loralib" else 1
    counted = -(-max(rank, 1) // side)
    width = counted * side
    if width >= term.rank:
        return module
    flat = (
        reshape(term.a, (term.rank, math.prod(term.a.shape[1:]))),
        reshape(term.b, (math.prod(term.b.shape) // term.rank, term.rank)),
    )
    a_type, b_type = (dtype if dtype and lossless(own, dtype) else own for own in (term.a.dtype, term.b.dtype))
    a = Compute("compress_a", flat, (("rank", width),), "", a_type, (width, flat[0].shape[1]))
    b = Compute("compress_b", flat, (("rank", width),), "", b_type, (flat[1].shape[0], width))
    small = Term(
        reshape(a, (width, *term.a.shape[1:])), reshape(b, (term.b.shape[0], width, *term.b.shape[2:])), 0, module.out
    )
    return replace(module, terms=(small,), scaling=rescaled(module, counted))


def refuse_grouped(modules: Sequence[LoraModule]) -> None:
    """Raise MappingError for factors that are no pair of matrices: peft's of grouped convolutions."""
    grouped = [module.path for module in modules if module.groups > 1 and module.conv_form == "peft"]
    if grouped:
        raise MappingError(
            "grouped conv factors cannot be compressed",
            where=grouped,
            hint="leave these modules out with --exclude, or leave out --compress",
        )


def _stacked(module: LoraModule) -> LoraModule:
    """Stack terms, leaving the scaling's value to the caller, who spells it for another rank anyway."""
    if module.plain:
        return module
    grown = grow(replace(module, scaling=Scaling(0.0, 1)))
    return replace(grown, scaling=module.scaling)
