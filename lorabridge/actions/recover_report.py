"""What an estimation found, as data, and the flags that say it to a conversion."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .recover_fit import nearest


@dataclass(frozen=True, slots=True)
class RecoveredRow:
    """One module.

    ``weight``: the parameter it was merged into, empty where there is none. ``fits``: the best reading explains the
    change. ``scaling``: what stands before ``B @ A`` in MERGED - BASE, with its standard ``error``. ``residual``: what
    it leaves of the change, relative to its norm; ``noise``: how much of that one rounding of MERGED may cause.
    ``known``: the scaling that the file or a flag states; ``times``: how often the delta was added then. ``other``:
    residual of the other storage order of a square weight. ``merged``: how often the delta is in the base weight that
    the adapter's own file holds.
    """

    path: str
    weight: str
    rank: int
    fits: bool
    scaling: float | None = None
    error: float | None = None
    residual: float | None = None
    noise: float | None = None
    known: float | None = None
    times: int | None = None
    enable_lora: tuple[bool, ...] | None = None
    fan_in_fan_out: bool | None = None
    other: float | None = None
    merged: int | None = None
    note: str = ""

    def alpha(self, *, rslora: bool) -> tuple[float, bool] | None:
        """Return the alpha of a reading (times rank, or times its root), and whether it is a simple number."""
        if self.scaling is None or self.error is None:
            return None
        factor = math.sqrt(self.rank) if rslora else float(self.rank)
        return nearest(self.scaling * factor, self.error * factor)


@dataclass(frozen=True, slots=True)
class RecoverReport:
    """One estimation; ``flags``: what to tell ``lorabridge convert`` about the adapter."""

    base: str
    merged: str
    adapter: str
    modules: tuple[RecoveredRow, ...]
    flags: tuple[str, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        """Every module is explained that has a weight in the models, and one at least."""
        with_weight = [row for row in self.modules if row.weight]
        silent = [row for row in with_weight if row.times == 0 and row.known is None]
        return bool(with_weight) and len(silent) < len(with_weight) and all(
            row.fits for row in with_weight if row not in silent
        )  # fmt: skip

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge recover --json``."""
        alphas = [{"alpha": _first(m.alpha(rslora=False)), "alpha_rslora": _first(m.alpha(rslora=True))}
                  for m in self.modules]  # fmt: skip
        rows = [{**asdict(row), **more} for row, more in zip(self.modules, alphas, strict=True)]
        return {"schema": "lorabridge/recover/1", "fits": self.fits, **asdict(self), "modules": rows}

    def summary(self) -> str:
        """Return one line: what the file does not say."""
        explained = [row for row in self.modules if row.fits]
        if not self.fits:
            return f"nothing fits: {len(explained)} of {len(self.modules)} modules are explained"
        times = Counter(row.times for row in explained if row.times is not None)
        words = {0: "not merged", 1: "merged once", 2: "merged twice"}
        said = [f"{words[n]}{'' if c == len(explained) else f' ({c} modules)'}" for n, c in sorted(times.items())]
        if self.exchanged:
            said.append("with the sign turned: are BASE and MERGED exchanged?")
        worst = max((row.residual for row in explained if row.residual is not None), default=0.0)
        said.append(f"{len(explained)} of {len(self.modules)} modules explained to {worst:.2g} of their change")
        return ", ".join(said)

    @property
    def exchanged(self) -> bool:
        """Every module's delta is in the change with its sign turned: as if BASE and MERGED were exchanged."""
        found = [row.scaling for row in self.modules if row.fits and row.scaling is not None]
        return bool(found) and all(scaling < 0 for scaling in found)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the modules as cells."""
        out: list[tuple[str, ...]] = []
        for m in self.modules:
            plain, root = m.alpha(rslora=False), m.alpha(rslora=True)
            mask = ",".join("T" if on else "F" for on in m.enable_lora) if m.enable_lora else ""
            order = "" if m.fan_in_fan_out is None else "in out" if m.fan_in_fan_out else "out in"
            out.append(
                (
                    m.path, _number(m.scaling), f"{plain[0]:g}" if plain else "", f"{root[0]:g}" if root else "",
                    _number(m.residual), "" if m.times is None else str(m.times), order, mask,
                    m.note if m.fits or m.note else "",
                )
            )  # fmt: skip
        return out

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        return table_html(self.summary(), HEADER, self.rows())


HEADER = ("module", "scaling", "alpha", "rsLoRA alpha", "residual", "times", "stored", "enable_lora", "")


def suggest(rows: Sequence[RecoveredRow]) -> tuple[str, ...]:
    """Return the flags for what is not known, those of most modules first and the exceptions by path."""
    fitting = [row for row in rows if row.fits and row.scaling is not None]
    unstated = [row for row in fitting if row.known is None or row.times is None]
    if all(row.scaling is not None and row.scaling < 0 for row in unstated):
        unstated = []  # MERGED is the base: no training states a negative alpha
    flags: list[str] = []
    if unstated:
        rslora = _reads_as_rslora(unstated)
        alphas = {row.path: found[0] for row in unstated if (found := row.alpha(rslora=rslora)) is not None}
        flags += _flags("--alpha", {path: f"{alpha:g}" for path, alpha in alphas.items()})
        flags += ["--use-rslora yes"] if rslora else []
    masks = {r.path: ",".join("T" if on else "F" for on in r.enable_lora) for r in fitting if r.enable_lora}
    flags += _flags("--enable-lora", masks, alone=len(masks) == len(fitting))
    orders = {row.path: "yes" if row.fan_in_fan_out else "no" for row in fitting if row.fan_in_fan_out is not None}
    if "yes" in orders.values():
        flags += [flag for flag in _flags("--fan-in-fan-out", orders) if not flag.endswith(" no")]
    states = {row.path: "yes" if row.merged else "no" for row in fitting if row.merged is not None}
    flags += _flags("--merged", states)
    return tuple(flags)


def _reads_as_rslora(rows: Sequence[RecoveredRow]) -> bool:
    """Say whether alpha / sqrt(rank) explains the scalings with fewer or simpler alphas than alpha / rank."""
    merit = []
    for rslora in (False, True):
        found = [alpha for row in rows if (alpha := row.alpha(rslora=rslora)) is not None]
        odd = sum(not simple for _, simple in found)
        merit.append((len({value for value, _ in found}), odd, sum(value != round(value) for value, _ in found)))
    return merit[1] < merit[0]


def _flags(name: str, said: dict[str, str], *, alone: bool = True) -> list[str]:
    """Say the commonest value for all modules, where that is allowed, and the others by path."""
    if not said:
        return []
    usual = Counter(said.values()).most_common(1)[0][0] if alone else None
    own = [f"{name} {shlex.quote(f'{path}={value}')}" for path, value in said.items() if value != usual]
    return [*([f"{name} {usual}"] if usual is not None else []), *own]


def _first(found: tuple[float, bool] | None) -> float | None:
    return found[0] if found else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
