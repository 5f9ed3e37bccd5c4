"""Which mapping of a torch checkpoint holds its tensors, and what else lies beside them."""

from __future__ import annotations

from ..errors import InputError
from .torchvalues import Refused, Table, Tensor, kind
from .untrusted import MAX_NAME, MAX_TENSORS, shown

RESAVE = "load it where it was made and save only its state_dict: torch.save(model.state_dict(), path)"


def choose(root: object, where: str, key: str | None) -> tuple[Table, str, list[tuple[str, str]]]:
    """Find the mapping that holds the tensors; returns it, the prefix for its skipped entries, and what is left out."""
    if not isinstance(root, Table):
        raise InputError(f"the file holds {kind(root)}, not a mapping of names to tensors", where=where, hint=RESAVE)
    choices = _candidates(root, where)
    if key is None and len(choices) > 1:
        listed = [f"{where}: {shown(name) if name else 'the top mapping'}, {kind(choices[name])}" for name in choices]
        raise InputError(
            "several mappings in the file hold tensors",
            where=listed,
            hint="save the wanted one alone: torch.save(torch.load(path, weights_only=True)[key], new_path)",
        )
    if not choices or (key is not None and key not in choices):
        listed = [f"{where}: {shown(_label(name))} is {kind(value)}" for name, value in root.items]
        raise InputError("the file has no mapping of names to tensors there", where=listed or where, hint=RESAVE)
    chosen = next(iter(choices)) if key is None else key
    if not chosen:
        return root, "", []
    left = [(_label(name), kind(value)) for name, value in root.items if not (isinstance(name, str) and name == chosen)]
    return choices[chosen], f"{shown(chosen)}.", left


def _candidates(root: Table, where: str) -> dict[str, Table]:
    """Return the mappings that hold tensors: the top one as "", and entries of it under their names."""
    _check_length(root, where)
    choices: dict[str, Table] = {"": root} if _holds_tensors(root) or not root.items else {}
    looked: dict[int, bool] = {}  # one table may stand under a million keys
    seen: set[str] = set()
    twice = []
    for name, value in root.items:
        if not isinstance(name, str):
            continue
        if name in seen:
            twice.append(f"{where}: {shown(name)} occurs twice")
        seen.add(name)
        if name and isinstance(value, Table):
            if id(value) not in looked:
                looked[id(value)] = _holds_tensors(value)
            if looked[id(value)]:
                choices[name] = value
    if twice:
        raise InputError("keys of the file's mapping are not unique", where=twice, hint=RESAVE)
    return choices


def _holds_tensors(table: Table) -> bool:
    return any(isinstance(value, Tensor | Refused) and isinstance(name, str) for name, value in table.items)


def _label(name: object) -> str:
    return name if isinstance(name, str) else str(name) if isinstance(name, bool | int) else kind(name)


def collect(table: Table, prefix: str, where: str) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Sort a mapping's entries into tensors and others; raises InputError listing what cannot be used."""
    _check_length(table, where)
    tensors: dict[str, Tensor] = {}
    others: list[tuple[str, str]] = []
    seen: set[str] = set()
    bad = []
    for name, value in table.items:
        if not isinstance(name, str):
            bad.append(f"{where}: a key is {kind(name)}, not a name")
            continue
        if name in seen:
            bad.append(f"{where}: {shown(name)} occurs twice")
        elif not name or len(name.encode(errors="surrogatepass")) > MAX_NAME or not _is_text(name):
            bad.append(f"{where}: {shown(name)} is no name: empty, too long or no text")
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Refused):
            bad.append(f"{where}: {shown(name)} is {value.reason}")
        else:
            others.append((prefix + name, kind(value)))
        seen.add(name)
    if bad:
        raise InputError("entries of the file cannot be used", where=bad, hint=RESAVE)
    return tensors, others


def _check_length(table: Table, where: str) -> None:
    if len(table.items) > MAX_TENSORS:
        raise InputError(f"a mapping has {len(table.items)} entries, more than {MAX_TENSORS}", where=where)


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
