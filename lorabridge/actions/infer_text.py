"""Spell what was inferred as a family table, with what is uncertain marked for the person who finishes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..dialects.adapter import Json
from ..errors import LorabridgeError
from ..families.tables import read_table
from .infer import HOLES, Found, Inference, Kind

_FIELDS = (
    "hidden_size", "n_embd", "d_model", "embed_dim", "intermediate_size", "n_inner", "d_ff", "vocab_size",
    "num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head", "num_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "n_positions", "type_vocab_size",
)  # fmt: skip
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "type_vocab_size")
"""Fields that are the lengths of no axis; a length may equal them by chance."""
_EMBEDDING = ("embed", "wte", "wpe")
_EVIDENCE = {
    "contents": "",
    "equal contents": " # AMBIGUOUS: equal contents, chosen by name; as well: ",
    "shapes": " # BY SHAPE AND NAME ONLY; as well: ",
}


class _Sizes:
    """The expressions for lengths, taken from the config's fields."""

    def __init__(self, config: Json) -> None:
        numbers = {key: value for key, value in config.items() if type(value) is int and value > 0}
        ordered = [*(f for f in _FIELDS if f in numbers), *(f for f in numbers if f not in _FIELDS)]
        self.fields = {name: numbers[name] for name in ordered}
        self.used: dict[str, str] = {}

    def of(self, length: int, *, counting: bool = False) -> str:
        """Return a field of that value, a small multiple or a quotient of fields, else the number itself.

        ``counting``: the number of layers is asked for, not the length of an axis.
        """
        for name, value in self.fields.items():
            if value == length and (counting or name not in _COUNTS):
                return self._use(name)
        main = [item for item in list(self.fields.items())[:14] if item[0] not in _COUNTS]
        for name, value in main:
            if length % value == 0 and 1 < length // value <= 8:
                return f"{length // value} * {self._use(name)}"
        for one, a in main:
            for other, b in main:
                if a == length * b and b > 1:
                    return f"{self._use(one)} / {self._use(other)}"
        return str(length)

    def _use(self, name: str) -> str:
        return self.used.setdefault(name, name)


def table_text(found: Inference, family: str) -> str:
    """Return the proposal as TOML; comments mark what is ambiguous, what only shapes support, and what is left over."""
    sizes = _Sizes(found.config)
    body = [line for one in _merged(found) for line in (*_rule(one, found, sizes), "")]
    for kind, other in found.tied:
        body += ["[[tied]]", f'hf = "{kind.template}"', f'to = "{other.template}"', ""]
    held = {f"{_module(kind)}.bias" for one in found.found if _is_linear(one) for kind in (*one.hf, *one.ms)}
    for kind in (kind for kind in found.hf_left if kind.template not in held):
        body += ["[[buffer]] # NOT MATCHED: map it, or say why it is left out", f'hf = "{kind.template}"',
                 'drop = "nothing on the MindSpore side fits it"', ""]  # fmt: skip
    for kind in (kind for kind in found.ms_left if kind.template not in held):
        body += ["[[buffer]] # NOT MATCHED: map it, or say why it is left out", f'ms = "{kind.template}"',
                 'drop = "nothing on the Hugging Face side fits it"', ""]  # fmt: skip
    holes = _holes(found, sizes)
    model_type = found.config.get("model_type")
    head = ["schema = 1", f'family = "{family}"', f'match = {{ model_type = ["{model_type}"] }}', ""]
    if sizes.used:
        head += ["[sizes]", *(f'{name} = "{name}"' for name in sizes.used), ""]
    if holes:
        head += ["[holes]", *holes, ""]
    return "\n".join([*head, *body]).rstrip() + "\n"


def problems(text: str) -> list[str]:
    """Return what the grammar has against a proposal; nothing where it is a table."""
    try:
        read_table(text, "the proposal")
    except LorabridgeError as error:
        where = error.where if isinstance(error.where, list | tuple) else [error.where]
        return [error.problem, *(str(place) for place in where if place)]
    return []


def _holes(found: Inference, sizes: _Sizes) -> list[str]:
    """Return the lines of the holes; a number that does not begin at 0 is a range."""
    spans: dict[str, tuple[int, int]] = {}
    every = [kind for one in found.found for kind in (*one.hf, *one.ms)] + [*found.hf_left, *found.ms_left]
    for kind in every:
        for hole, numbers in zip(HOLES, kind.counts, strict=False):
            low, high = spans.get(hole, (numbers[0], numbers[-1]))
            spans[hole] = min(low, numbers[0]), max(high, numbers[-1])
    return [
        f'{hole} = "{sizes.of(high + 1, counting=True)}"' if low == 0 else f'{hole} = "{low} .. {high + 1}"'
        for hole, (low, high) in spans.items()
    ]


def _merged(found: Inference) -> Iterator[Found]:
    """Leave out the biases that belong to a linear layer that is matched."""
    modules = {(tuple(map(_module, one.hf)), tuple(map(_module, one.ms))) for one in found.found if _is_linear(one)}
    for one in found.found:
        key = (tuple(map(_module, one.hf)), tuple(map(_module, one.ms)))
        bias = all(kind.template.endswith(".bias") for kind in (*one.hf, *one.ms))
        if not (bias and key in modules):
            yield one


def _module(kind: Kind) -> str:
    return kind.template.rpartition(".")[0]


def _is_linear(one: Found) -> bool:
    names = [kind.template for kind in (*one.hf, *one.ms)]
    matrix = all(len(kind.shape) == 2 for kind in (*one.hf, *one.ms))
    return matrix and all(name.endswith(".weight") for name in names) and not _is_embedding(one)


def _is_embedding(one: Found) -> bool:
    last = one.ms[0].template.rpartition(".")[2]
    named = any(word in one.hf[0].template for word in _EMBEDDING)
    return len(one.hf[0].shape) == 2 and (last.startswith("embedding_") or (named and last == "weight"))


def _rule(one: Found, found: Inference, sizes: _Sizes) -> list[str]:
    note = _EVIDENCE[one.evidence]
    note = f"{note}{', '.join(one.others) or 'nothing'}" if note else ""
    if _is_linear(one):
        return [f"[[linear]]{note}", *_linear(one, found, sizes)]
    if len(one.hf) > 1 or len(one.ms) > 1:
        return [f"# NOT SPELLED: {', '.join(k.template for k in one.hf)} <-> {', '.join(k.template for k in one.ms)}"]
    kind = "embedding" if _is_embedding(one) else "param"
    lines = [f"[[{kind}]]{note}", f'hf = "{one.hf[0].template}"', f'ms = "{one.ms[0].template}"']
    lines.append(f'axes = "{_axes(one.hf[0].shape, sizes)}"')
    if one.turned:
        lines.append('ms_axes = "1 0" # transposed: say it as mappings/README.md does')
    elif one.hf[0].shape != one.ms[0].shape:
        lines.append(f'ms_axes = "{_axes(one.ms[0].shape, sizes)}"')
    return lines


def _axes(shape: tuple[int, ...], sizes: _Sizes) -> str:
    """Return sizes separated by spaces; an expression of several words becomes its number."""
    texts = [sizes.of(length) for length in shape]
    return " ".join(text if " " not in text else str(length) for text, length in zip(texts, shape, strict=True))


def _linear(one: Found, found: Inference, sizes: _Sizes) -> list[str]:
    fused_hf = len(one.hf) < len(one.ms)
    parts = one.ms if fused_hf else one.hf
    orders = _orders(one, found)
    letters = _letters(parts)
    out = [kind.shape[1] if _side_turned(kind, one, orders) else kind.shape[0] for kind in parts]
    inner = parts[0].shape[0] if _side_turned(parts[0], one, orders) else parts[0].shape[1]
    if len(parts) == 1:
        lines = [f'hf = "{_module(one.hf[0])}"', f'ms = "{_module(one.ms[0])}"', f'out = "{sizes.of(out[0])}"']
    else:
        split = ", ".join(f'{p} = "{_module(k)}"' for p, k in zip(letters, parts, strict=True))
        whole = one.hf[0] if fused_hf else one.ms[0]
        one_side = f'{{ all = "{_module(whole)}" }}'
        lines = [f"hf = {one_side if fused_hf else '{ ' + split + ' }'}"]
        lines += [f"ms = {'{ ' + split + ' }' if fused_hf else one_side}"]
        lines += ["out = { " + ", ".join(f'{p} = "{sizes.of(n)}"' for p, n in zip(letters, out, strict=True)) + " }"]
    lines.append(f'in = "{sizes.of(inner)}"')
    lines += [f'{side}_order = "in out"' for side in orders]
    if not orders and len(parts) == 1 and inner == out[0]:
        lines.append("# square: if both sides store [in, out], say so with hf_order and ms_order; LoRA depends on it")
    if one.groups > 1:
        lines.append(f'groups = "{sizes.of(one.groups)}"')
    if _has_bias(one, found):
        lines.append("bias = true")
    return lines


def _orders(one: Found, found: Inference) -> list[str]:
    """Return the sides that store [in, out]: a bias as long as the matrix's second axis gives it away.

    Where no bias tells and one side is turned, a fused side is taken to be the turned one, else MindSpore's.
    """
    told: dict[str, bool] = {}
    for side, kinds in (("hf", one.hf), ("ms", one.ms)):
        for kind in kinds:
            rows, columns = kind.shape
            bias = _bias(kind, found)
            if bias is not None and rows != columns and bias.shape in ((rows,), (columns,)):
                told[side] = bias.shape == (columns,)
    if not told:
        return [] if not one.turned else ["hf"] if len(one.hf) < len(one.ms) else ["ms"]
    if len(told) == 1:
        side, turned = next(iter(told.items()))
        told["ms" if side == "hf" else "hf"] = turned != one.turned
    return [side for side in ("hf", "ms") if told[side]]


def _bias(kind: Kind, found: Inference) -> Kind | None:
    every = [k for other in found.found for k in (*other.hf, *other.ms)] + [*found.hf_left, *found.ms_left]
    return next((k for k in every if k.template == f"{_module(kind)}.bias" and len(k.shape) == 1), None)


def _side_turned(kind: Kind, one: Found, orders: list[str]) -> bool:
    return (kind in one.hf and "hf" in orders) or (kind in one.ms and "ms" in orders)


def _letters(parts: tuple[Kind, ...]) -> list[str]:
    """Name the parts by the words in which their modules differ, else by numbers."""
    words = [_module(kind).rpartition(".")[2] for kind in parts]
    plain = [word.replace("-", "_").lower() for word in words]
    return plain if len(set(plain)) == len(plain) else [f"part{number}" for number in range(len(parts))]


def _has_bias(one: Found, found: Inference) -> bool:
    return all(_bias(kind, found) is not None for kind in (*one.hf, *one.ms))


def counts(found: Inference) -> Mapping[str, int]:
    """Return how many correspondences rest on what, and how many kinds of tensors are left."""
    rows = {name: sum(one.evidence == name for one in found.found) for name in ("contents", "equal contents", "shapes")}
    return {**rows, "tied": len(found.tied), "left": len(found.hf_left) + len(found.ms_left)}
