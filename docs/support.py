"""Write docs/support.md: what every dialect can hold and every family covers, found by asking the code.

    python docs/support.py [--check]

For every dialect and every kind of adapter a small adapter is written and read again; what the dialect says is the
cell.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lorabridge.axes import read
from lorabridge.dialects import DIALECTS, experts
from lorabridge.dialects.adapter import (
    Adapter,
    Content,
    Dialect,
    Extra,
    Fact,
    Facts,
    LoraModule,
    Scaling,
    StackItem,
    Term,
    Written,
)
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import LorabridgeError
from lorabridge.families.tables import load_tables
from lorabridge.tensors import TensorSpec

PAGE = Path(__file__).with_name("support.md")
OUT, IN, RANK = 320, 320, 2
WIDTHS = {"xlabs": 3072}
"""How wide the layers of a dialect's network are, where they are not OUT and IN."""
PATH = "model.layers.0.self_attn.q_proj"

UNET = {
    "linear": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "conv2d": "unet.down_blocks.0.resnets.0.conv1",
}
PATHS: dict[str, dict[str, str]] = {
    "slora": {"linear": "model.layers.0.attention.wq", "embedding": "model.tok_embeddings"},
    "kohya": UNET, "diffusers": UNET, "mindone": UNET, "comfy": UNET, "bfl": UNET,
    "xlabs": {"linear": "transformer.transformer_blocks.0.attn.to_out.0"},
    "torchtune": {"linear": "layers.0.attn.q_proj"},
    "gguf": {"linear": "blk.0.attn_q", "embedding": "token_embd"},
    "mindone-gm": {"linear": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"},
}  # fmt: skip
"""What a module is called where a dialect knows the names of some networks only."""
SD15 = Facts((Fact("*", "names_of", "sd15"),))
TOLD = {
    "gguf": Facts((Fact("*", "table", "llama_gguf"),)), "kohya": SD15, "comfy": SD15, "bfl": SD15,
    "xlabs": Facts((Fact("*", "names_of", "flux"),)),
}  # fmt: skip
"""What a conversion tells a dialect beside the adapter."""
ABSENT = re.compile(r"has (?:no|neither) |adapts q, k, v|no place in|linear layers only|and nothing beside them")
"""Reasons that say only that the format has no such thing."""

HEAD = """\
# What is supported

This page is made by `python docs/support.py`, which asks the code; a test fails when it is out of date. What the words
of a dialect's row mean is in [dialects.md](dialects.md), [mindformers.md](mindformers.md),
[diffusion.md](diffusion.md), [other-dialects.md](other-dialects.md) and [mindpet.md](mindpet.md).

## Dialects and kinds

*yes*: written and read again with the same factors, scaling and values. *grown*, *folded*: the same delta, by factors
of a larger rank or with the scaling inside B (exact for powers of two, else rounded once, with the residue in the
manifest).
*no*: the format has no such thing; *no (n)*: refused, for the reason n below the table. Every kind can be merged.
"""


def tensor(name: str, *shape: int) -> TensorSpec:
    """Describe a float32 tensor."""
    return TensorSpec(name, BY_NAME["float32"], shape)


def module(**changes: object) -> LoraModule:
    """Return an adapted linear module."""
    a, b = read(tensor("a", RANK, IN)), read(tensor("b", OUT, RANK))
    plain = LoraModule(PATH, "linear", OUT, (Term(a, b, 0, OUT),), Scaling(4.0, RANK))
    return replace(plain, **changes)  # type: ignore[arg-type]


def convolution(dims: int) -> LoraModule:
    """Return an adapted convolution in peft's factorization."""
    kernel, ones = (3,) * dims, (1,) * dims
    term = Term(read(tensor("a", RANK, IN, *kernel)), read(tensor("b", OUT, RANK, *ones)), 0, OUT)
    return module(path="encoder.conv1", kind=f"conv{dims}d", terms=(term,), kernel_size=kernel)


def blocks() -> LoraModule:
    """Return a fused module of which the first and the last third are adapted apart."""
    terms = tuple(
        Term(read(tensor(f"a{i}", RANK, IN)), read(tensor(f"b{i}", OUT, RANK)), i * OUT, (i + 1) * OUT) for i in (0, 2)
    )
    return module(path="h.0.attn.c_attn", terms=terms, out=3 * OUT)


def extra(kind: str, path: str, parameter: str, *shape: int) -> Extra:
    """Return a tensor beside the factors."""
    return Extra(path, parameter, read(tensor("x", *shape)), kind)  # type: ignore[arg-type]


def expert() -> LoraModule:
    """Return an expert of a stacked tensor."""
    stored = "decoder.layers.0.mlp.experts.weight1"
    return module(path=f"{stored}.0", stack=StackItem(stored, 0, 1), fan_in_fan_out=True)


def patterned() -> Adapter:
    """Return two modules whose scalings differ."""
    other = module(path=PATH.replace("q_proj", "v_proj"), scaling=Scaling(5.0, RANK))
    second = replace(other, terms=(Term(read(tensor("c", RANK, IN)), read(tensor("d", OUT, RANK)), 0, OUT),))
    return Adapter((module(), second))


SAVED = ("score", "weight", 3, IN)
KINDS: dict[str, Callable[[], Adapter]] = {
    "linear": lambda: Adapter((module(),)),
    "rsLoRA": lambda: Adapter((module(scaling=Scaling(4.0, RANK, rslora=True)),)),
    "scaling per module": patterned,
    "fused, blocks apart": lambda: Adapter((blocks(),)),
    "DoRA": lambda: Adapter((module(magnitude=read(tensor("m", OUT))),)),
    "bias of B": lambda: Adapter((module(lora_bias=read(tensor("l", OUT))),)),
    "embedding": lambda: Adapter((module(path="model.embed_tokens", kind="embedding"),)),
    "conv1d": lambda: Adapter((convolution(1),)),
    "conv2d": lambda: Adapter((convolution(2),)),
    "conv3d": lambda: Adapter((convolution(3),)),
    "experts": lambda: Adapter((expert(),)),
    "saved modules": lambda: Adapter((module(),), (extra("modules_to_save", *SAVED),)),
    "biases": lambda: Adapter((module(),), (extra("bias", PATH, "bias", OUT),), {"bias": "lora_only"}),
}


def placed(dialect: Dialect, adapter: Adapter) -> Adapter:
    """Return the adapter with the names of a network that the dialect knows."""
    known = PATHS.get(dialect.name, {})

    def path(one: LoraModule) -> str:
        named = known.get(one.kind)
        if named is None or one.stack is not None or len(one.terms) > 1:
            return one.path
        return (
            named.replace("q_proj", "v_proj")
            .replace("to_q", "to_v")
            .replace("attn_q", "attn_v")
            .replace("wq", "wv")
            .replace("to_out.0", "to_add_out")
            if one.path.endswith("v_proj")
            else named
        )

    old = {one.path: path(one) for one in adapter.modules}
    extras = tuple(replace(one, path=old.get(one.path, one.path)) for one in adapter.extras)
    return replace(adapter, modules=tuple(replace(one, path=old[one.path]) for one in adapter.modules), extras=extras)


def outcome(dialect: Dialect, adapter: Adapter) -> str:
    """Write an adapter and read it again; return "yes", "grown", "folded" or what the dialect says against it."""
    adapter = placed(dialect, adapter)
    if any(one.stack for one in adapter.modules) and dialect.name not in experts.DIALECTS:
        return "has no factors of experts that one tensor holds"  # what conversion.forward says
    try:
        written = dialect.write(adapter, TOLD.get(dialect.name, Facts()))
        again = dialect.parse(content(dialect, adapter, written))
    except LorabridgeError as error:
        return error.problem
    if len(again.modules) != len(adapter.modules):
        return "grown"
    for old, new in zip(adapter.modules, again.modules, strict=True):
        if sum(term.rank for term in new.terms) != sum(term.rank for term in old.terms) or len(new.terms) != len(
            old.terms
        ):
            return "grown"
        if abs(new.scaling.value - old.scaling.value) > 1e-12:
            return "folded"
    return "yes"


def content(dialect: Dialect, adapter: Adapter, written: Written) -> Content:
    """Return what a file with the written tensors says, with the facts that travel in its manifest."""
    specs = {name: TensorSpec(name, expr.dtype, expr.shape) for name, expr in written.tensors}
    container = "mindspore" if dialect.framework == "mindspore" else "safetensors"
    known = [Fact(m.path, "kind", m.kind) for m in written.modules] + [
        Fact(m.path, "kernel_size", list(m.kernel_size)) for m in written.modules if m.kernel_size
    ]
    known += [Fact(name, "value", 4.0) for name in specs if name.endswith(".alpha")]
    metadata = {"container": "gguf" if dialect.name == "gguf" else container, **written.metadata}
    return Content(specs, metadata, written.config, written.facts.then(Facts(tuple(known))))


def dialect_table() -> Iterator[str]:
    """Yield the lines of the table of dialects, and the reasons under it."""
    reasons: dict[str, int] = {}
    yield "| dialect | framework | " + " | ".join(KINDS) + " |"
    yield "|---|---|" + "---|" * len(KINDS)
    global OUT, IN
    usual = OUT, IN
    for dialect in DIALECTS:
        OUT, IN = (WIDTHS[dialect.name],) * 2 if dialect.name in WIDTHS else usual
        cells = []
        for make in KINDS.values():
            said = outcome(dialect, make())
            if ABSENT.search(said):
                said = "no"
            elif said not in ("yes", "grown", "folded"):
                said = f"no ({reasons.setdefault(said, len(reasons) + 1)})"
            cells.append(said)
        OUT, IN = usual
        yield f"| `{dialect.name}` | {dialect.framework} | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"{number}. {reason}" for reason, number in reasons.items())


def family_table() -> Iterator[str]:
    """Yield the lines of the table of families."""
    yield "| family | model types of transformers | layouts |"
    yield "|---|---|---|"
    for name, table in sorted(load_tables().items()):
        layouts = []
        for layout in table.layouts:
            choices = ", ".join(f"*{c}*" if c == layout.default else c for c, _ in layout.choices)
            layouts.append(f"`{layout.name}`: {choices}")
        types = ", ".join(table.model_types) or ("any" if table.identity else "none")
        yield f"| `{name}` | {types} | {'; '.join(layouts) or 'none'} |"


FAMILIES = """\
## Families and layouts

Full models and adapters go through a family's table in both directions, bit for bit in every layout. The default of a
layout is in *italics*; without one the choice must be given where names do not tell it. `lorabridge tables show NAME`
says to which releases a choice belongs; what each table rests on is in [families.md](families.md) and
[families-other.md](families-other.md).
"""


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *dialect_table(), "", FAMILIES, *family_table(), ""])


def main() -> None:
    """Write the page, or check it."""
    if "--check" in sys.argv[1:]:
        sys.exit(
            0 if PAGE.read_text("utf-8") == page() else "docs/support.md is out of date: run python docs/support.py"
        )
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
