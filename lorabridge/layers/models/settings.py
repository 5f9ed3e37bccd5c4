"""Reading a config.json field by field, so that no field is ignored without somebody having decided so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import MappingError

# Fields of any config that do not change what a network computes at inference: who made it, how it was trained, how
# text is generated from it, how its output is packed. A name that begins with an underscore is private to transformers.
INERT = frozenset((
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "name_or_path",
    "problem_type", "finetuning_task", "task_specific_params", "label2id", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_past", "bos_token_id", "eos_token_id", "sep_token_id",
    "decoder_start_token_id", "initializer_range", "gradient_checkpointing", "chunk_size_feed_forward",
    "attn_implementation", "pretraining_tp", "tokenizer_class", "prefix", "torchscript", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "tf_legacy_loss", "use_bfloat16", "tie_encoder_decoder",
))  # fmt: skip
FALSE = ("is_decoder", "is_encoder_decoder", "add_cross_attention")


@dataclass(frozen=True, slots=True)
class Fields:
    """A config, and what was asked of it. Methods note a problem and go on; :meth:`finish` raises them all."""

    config: Mapping[str, object]
    wanted: str = ""
    prefix: str = ""
    asked: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @property
    def model_type(self) -> str:
        """The family as transformers calls it."""
        return str(self.config.get("model_type"))

    def architecture(self, known: tuple[str, ...]) -> str:
        """Return the class whose weights are meant, one of those known."""
        listed = self.config.get("architectures")
        name = self.wanted or (listed[0] if isinstance(listed, list) and len(listed) == 1 else "")
        if not name:
            self.problems.append(f"architectures: {listed!r} does not name one class; pass architecture=")
        elif name not in known:
            self.problems.append(f"architectures: {name} has no reference network; there are {', '.join(known)}")
        return str(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a positive integer; null counts as absent."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._complain(name, value, "a positive integer")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        """Return a positive number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self._complain(name, value, "a positive number")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self._complain(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """Return one of several words."""
        value = self._get(name, default)
        if value not in choices:
            self._complain(name, value, f"one of {', '.join(choices)}")
            return default
        return str(value)

    def only(self, name: str, *values: object) -> None:
        """Require that a field, where it is given, has one of these values; anything else is not implemented."""
        value = self._get(name, None)
        if value is not None and value not in values:
            self._complain(name, value, " or ".join(repr(v) for v in values) or "absent")

    def inert(self, *names: str) -> None:
        """Declare fields that do not change this family's output."""
        self.asked.update(names)

    def labels(self) -> int:
        """Return the number of labels of a classifier: ``num_labels`` or the entries of ``id2label``; 2 by default."""
        named = self._get("id2label", None)
        count = self._get("num_labels", None)
        if isinstance(named, Mapping) and named:
            if count not in (None, len(named)):
                self._complain("num_labels", count, f"{len(named)}, the entries of id2label")
            return len(named)
        return self.integer("num_labels", 2)

    def divides(self, whole: int, parts: int, name: str) -> None:
        """Require that ``parts`` divides ``whole``."""
        if whole % parts:
            self.problems.append(f"{name}: {whole} does not divide by {parts}")

    def nested(self, name: str) -> Fields:
        """Return an object among the fields, empty where it is absent or null; :meth:`merge` takes its problems."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, Mapping):
            self._complain(name, value, "an object")
        inside = value if isinstance(value, Mapping) else {}
        return Fields({f"{name}.{key}": entry for key, entry in inside.items()}, prefix=f"{name}.")

    def merge(self, *others: Fields) -> None:
        """Take over the problems of nested objects, unknown fields included."""
        for other in others:
            self.problems.extend((*other.problems, *other.unknown()))

    def unknown(self) -> list[str]:
        """Return a line for each field that nobody asked for and that is not null."""
        return [
            f"{name}: {str(value)[:60]!r} is not a field that the network knows"
            for name, value in self.config.items()
            if value is not None and name not in self.asked and name not in INERT and not name.startswith("_")
        ]

    def finish(self) -> None:
        """Raise one MappingError for every field that has a wrong value, or that nobody asked for."""
        for name in FALSE:
            self.only(name, False)
        self.only("pruned_heads", {})
        self.problems.extend(self.unknown())
        if self.problems:
            raise MappingError(
                f"the {self.model_type} reference network does not follow this config", where=self.problems,
                hint="a field without influence on the logits can be taken out of the config that is passed",
            )  # fmt: skip

    def _get(self, name: str, default: object) -> object:
        name = self.prefix + name
        self.asked.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def _complain(self, name: str, value: object, wanted: str) -> None:
        said = "is missing" if value is None else f"is {str(value)[:60]!r}"
        self.problems.append(f"{self.prefix}{name}: {said}, but must be {wanted}")
