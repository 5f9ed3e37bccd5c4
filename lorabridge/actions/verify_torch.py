"""Whole networks of transformers: loaded from their own files by their own code, run in float32 and in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .. import frameworks
from ..errors import InputError, MappingError

Array = npt.NDArray[np.generic]
Outputs = Mapping[str, Array]


class Tensor(Protocol):
    """The part of ``torch.Tensor`` that is used."""

    T: Tensor

    def detach(self) -> Tensor: ...  # noqa: D102
    def clone(self) -> Tensor: ...  # noqa: D102
    def double(self) -> Tensor: ...  # noqa: D102
    def numpy(self) -> Array: ...  # noqa: D102
    def is_floating_point(self) -> bool: ...  # noqa: D102
    def to(self, dtype: object) -> Tensor: ...  # noqa: D102
    def copy_(self, other: Tensor) -> Tensor: ...  # noqa: D102
    def __add__(self, other: Tensor) -> Tensor: ...


class Handle(Protocol):
    """A registered hook."""

    def remove(self) -> None: ...  # noqa: D102


class Logging(Protocol):
    """The part of ``transformers.utils.logging`` that is used."""

    def is_progress_bar_enabled(self) -> bool: ...  # noqa: D102
    def disable_progress_bar(self) -> None: ...  # noqa: D102
    def enable_progress_bar(self) -> None: ...  # noqa: D102
    def get_verbosity(self) -> int: ...  # noqa: D102
    def set_verbosity(self, level: int) -> None: ...  # noqa: D102
    def set_verbosity_error(self) -> None: ...  # noqa: D102


Hook = Callable[[object, object, Tensor | tuple[Tensor, ...]], None]


class Module(Protocol):
    """The part of ``torch.nn.Module`` that is used."""

    def state_dict(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    def named_modules(self) -> Iterator[tuple[str, Module]]: ...  # noqa: D102
    def get_submodule(self, path: str) -> Module: ...  # noqa: D102
    def register_forward_hook(self, hook: Hook) -> Handle: ...  # noqa: D102
    def double(self) -> Module: ...  # noqa: D102
    def __call__(self, ids: Tensor, **beside: Tensor) -> Mapping[str, Tensor]: ...  # noqa: D102
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids ``[batch, time]``; ``mask`` 1 or 0 of the same shape, or None; ``types``: BERT's token types."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64] | None = None
    types: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class TorchNetwork:
    """A network in float32; ``missing``: parameters that its files do not give. ``plain``: weights before deltas."""

    module: Module
    missing: tuple[str, ...] = ()
    plain: dict[str, Tensor] = field(default_factory=dict)

    def weights(self) -> dict[str, Array]:
        """Return the parameters and buffers by transformers' names, float ones as float32 (shared memory)."""
        return {name: tensor.detach().numpy() for name, tensor in self.module.state_dict().items()}

    def blocks(self) -> list[str]:
        """Return the paths of the transformer's blocks, first to last."""
        torch = frameworks.load("torch")

        for path, module in self.module.named_modules():
            if isinstance(module, torch.nn.ModuleList):
                return [f"{path}.{i}" for i in range(len(module))]
        return []


def load(
    config: Mapping[str, object], architecture: str, weights: Path | Mapping[str, Array]
) -> TorchNetwork:  # fmt: skip
    """Build ``transformers.<architecture>`` from a config and a model directory, or from parameters by name.

    Weights are upcast to float32, exactly from the half types. No network access, no code from the directory. Raises
    InputError with transformers' own words where it refuses the files.
    """
    torch, transformers = frameworks.load("torch"), frameworks.load("transformers")

    kind = getattr(transformers, architecture)
    stated = kind.config_class.from_dict(dict(config))
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = {"dtype" if release >= (4, 56) else "torch_dtype": torch.float32, "attn_implementation": "sdpa"}
    with _silence(transformers.utils.logging):
        try:
            if isinstance(weights, Path):
                folder = weights if weights.is_dir() else weights.parent
                made, info = kind.from_pretrained(
                    str(folder), config=stated, local_files_only=True, output_loading_info=True, **options
                )
            else:
                state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
                made, info = kind.from_pretrained(
                    None, config=stated, state_dict=state, output_loading_info=True, **options
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            where = str(weights) if isinstance(weights, Path) else architecture
            raise InputError(f"transformers cannot load the weights: {error}", where=where) from error
    return TorchNetwork(made.eval().float(), tuple(sorted(info["missing_keys"])))


@contextmanager
def _silence(logging: Logging) -> Iterator[None]:
    """Keep transformers' progress bars and remarks off the terminal; what matters of them is checked here."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def attach_peft(network: TorchNetwork, folder: Path) -> tuple[str, ...]:
    """Load an adapter directory with peft; return what peft says is missing in it.

    Raises MappingError with peft's own words where the adapter does not fit the network.
    """
    peft = frameworks.load("peft")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            peft.PeftModel.from_pretrained(network.module, str(folder), is_trainable=False).eval()
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise MappingError(
                "peft cannot load the adapter into this base", where=" ".join(str(error).split())[:500],
                hint="check --base: is it this adapter's?",
            ) from error  # fmt: skip
    return tuple(str(said.message) for said in heard if "missing adapter keys" in str(said.message))


def add_deltas(network: TorchNetwork, deltas: Mapping[str, Array]) -> None:
    """Set adapted weights to base plus delta ``[out, in]`` (embedding: ``[dim, vocabulary]``), rounded once.

    Called again after :func:`widen`, it starts from the base again and rounds to float64. Raises MappingError for
    paths that the network does not have.
    """
    torch = frameworks.load("torch")

    lost = []
    with torch.no_grad():
        for path, delta in deltas.items():
            module = _submodule(network.module, path)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor):
                lost.append(path)
                continue
            turned = isinstance(module, torch.nn.Embedding) or type(module).__name__ == "Conv1D"
            plain = network.plain.setdefault(path, weight.detach().clone())
            wide = torch.from_numpy(np.array(delta, np.float64))
            weight.copy_(plain.double() + (wide.T if turned else wide))
    _refuse(lost)


def set_values(network: TorchNetwork, values: Mapping[str, Array]) -> None:
    """Replace parameters by name; MappingError for names that the network does not have."""
    torch = frameworks.load("torch")

    lost = []
    with torch.no_grad():
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            parameter = getattr(_submodule(network.module, path), leaf, None)
            if not isinstance(parameter, torch.Tensor):
                lost.append(name)
                continue
            parameter.copy_(torch.from_numpy(np.array(value, np.float64)))
    _refuse(lost)


def round_values(network: TorchNetwork, dtype: str) -> None:
    """Round every float parameter to one of torch's types; they stay float32."""
    torch = frameworks.load("torch")
    with torch.no_grad():
        for tensor in network.module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, dtype)))


def widen(network: TorchNetwork) -> None:
    """Compute in float64 from now on."""
    network.module.double()


def run(network: TorchNetwork, batches: Sequence[Batch], blocks: Iterable[str]) -> list[Outputs]:
    """Return for each batch the output of every block ``[batch, time, hidden]``, and the network's own.

    The network's own are "logits", or "hidden states" (and "pooled output") of a class without a head.
    """
    torch = frameworks.load("torch")

    seen: dict[str, Array] = {}

    def keep(path: str) -> Hook:
        def hook(module: object, given: object, out: Tensor | tuple[Tensor, ...]) -> None:
            seen[path] = (out[0] if isinstance(out, tuple) else out).double().numpy()

        return hook

    handles = [network.module.get_submodule(path).register_forward_hook(keep(path)) for path in blocks]
    found: list[Outputs] = []
    try:
        for batch in batches:
            with torch.no_grad():
                out = network.module(torch.from_numpy(batch.ids), **_beside(batch))
            found.append({**seen, **_finals(out)})
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _beside(batch: Batch) -> dict[str, Tensor]:
    torch = frameworks.load("torch")

    given = {"attention_mask": batch.mask, "token_type_ids": batch.types}
    return {name: torch.from_numpy(value) for name, value in given.items() if value is not None}


def _finals(out: Mapping[str, Tensor]) -> dict[str, Array]:
    torch = frameworks.load("torch")

    if "logits" in out:
        return {"logits": out["logits"].double().numpy()}
    if "start_logits" in out:
        return {"logits": torch.stack((out["start_logits"], out["end_logits"]), -1).double().numpy()}
    named = {"hidden states": "last_hidden_state", "pooled output": "pooler_output"}
    return {name: out[key].double().numpy() for name, key in named.items() if key in out and out[key] is not None}


def _submodule(module: Module, path: str) -> Module | None:
    """Return a module by its path, with or without the prefix of the class below the head."""
    prefix = str(getattr(module, "base_model_prefix", ""))
    for name in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    return None


def _refuse(lost: list[str]) -> None:
    if lost:
        raise MappingError(
            f"{len(lost)} places are not in the torch network", where=lost, hint="check --base: is it this adapter's?"
        )
