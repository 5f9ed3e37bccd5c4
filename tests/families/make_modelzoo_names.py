"""Build small networks of MindSpore's ModelZoo and write their parameters' names and shapes beside this file.

``python make_modelzoo_names.py MODELS FAMILY ...`` writes ``networks/FAMILY_modelzoo.2023-07.json``; MODELS is a
checkout of mindspore-ai/models at eab643f51 (July 2023, its last commit). Run with mindspore 2.10.0 on the CPU for
bert, gpt2 and albert, and with 2.0.0 for gpt, whose layers of mindspore.parallel later releases do not have; building
needs nothing in its stead. The tests read what this wrote and run none of it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

OUT = Path(__file__).parent / "networks"
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14,
         "max_position_embeddings": 17, "type_vocab_size": 3}  # fmt: skip
ALBERT = SIZES | {"embedding_size": 10, "num_hidden_layers": 3, "num_hidden_groups": 1, "inner_group_num": 1}
LABELS = {"num_labels": 5}
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 17, "n_inner": 14, "bos_token_id": 0,
        "eos_token_id": 0}  # fmt: skip
OWN_GPT2 = {"vocab_size": 31, "d_model": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14,
            "max_position_embeddings": 17, "batch_size": 1, "seq_length": 16}  # fmt: skip
POOLER = "the pooler, which this class of transformers is without"
COUNTER = "a counter of the training wrapper"
NO_POOLER = dict.fromkeys(("bert.dense.weight", "bert.dense.bias"), POOLER)
WRAPPED = {"ms_prefix": "bert.bert.", "heads": "wrapper"}
NO_ALBERT_POOLER = dict.fromkeys(("albert.dense.weight", "albert.dense.bias"), POOLER)
Entry = dict[str, object]


def bert() -> list[Entry]:
    model = importlib.import_module("src.bert_model")
    config = model.BertConfig(seq_length=16, **SIZES)
    pretraining = importlib.import_module("src.bert_for_pre_training")
    tasks = importlib.import_module("src.finetune_eval_model")
    wrappers = importlib.import_module("src.bert_for_finetune")
    counters = dict.fromkeys(("total_num", "start_num", "end_num"), COUNTER)
    squad = {f"bert.{name}": why for name, why in NO_POOLER.items()} | counters
    return [
        entry("BertModel", model.BertModel(config, True), "BertModel", layout={"ms_prefix": "", "hf_prefix": ""}),
        entry("BertPreTraining", pretraining.BertPreTraining(config, True, False), "BertForPreTraining"),
        entry("BertNetworkWithLoss", pretraining.BertNetworkWithLoss(config, True), "BertForPreTraining",
              layout=WRAPPED),
        entry("BertCLSModel", tasks.BertCLSModel(config, True, 5), "BertForSequenceClassification"),
        entry("BertNERModel", tasks.BertNERModel(config, True, 5), "BertForTokenClassification", own=NO_POOLER),
        entry("BertSquadModel", tasks.BertSquadModel(config, True, 2), "BertForQuestionAnswering", own=NO_POOLER),
        entry("BertCLS", wrappers.BertCLS(config, True, 5), "BertForSequenceClassification", layout=WRAPPED),
        entry("BertSquad", wrappers.BertSquad(config, True, 2), "BertForQuestionAnswering", layout=WRAPPED, own=squad),
    ]  # fmt: skip


def gpt2() -> list[Entry]:
    model = importlib.import_module("src.GPT2_model")
    config = model.GPT2Config(**OWN_GPT2)
    language = importlib.import_module("src.GPT2ForLanguageModel")
    cloze = importlib.import_module("src.GPT2ForCBT")
    return [
        entry("GPT2Model", model.GPT2Model(config, True), "GPT2Model", layout={"ms_prefix": "", "hf_prefix": ""}),
        entry("GPT2LanguageModel", language.GPT2LanguageModel(config, True), "GPT2LMHeadModel",
              layout={"head": "dense1"}),
        entry("GPT2CBTModel", cloze.GPT2CBTModel(config, True), "GPT2LMHeadModel", layout={"head": "lm_head"}),
    ]  # fmt: skip


def gpt() -> list[Entry]:
    model = importlib.import_module("src.gpt")
    settings = importlib.import_module("src.utils")
    config = settings.GPTConfig(
        batch_size=1, seq_length=17, vocab_size=31, embedding_size=12, num_layers=2, num_heads=2
    )  # fmt: skip
    net = model.GPT(config)
    return [
        {**entry("GPT", net, hf, layout=layout), "fields": {**GPT2, "n_inner": 48}}
        for hf, layout in (("GPT2LMHeadModel", {}), ("GPT2Model", {"hf_prefix": ""}))
    ]  # fmt: skip


def albert() -> list[Entry]:
    model = importlib.import_module("src.albert_model")
    config = model.AlbertConfig(seq_length=16, **ALBERT)
    tasks = importlib.import_module("src.finetune_eval_model")
    wrappers = importlib.import_module("src.albert_for_finetune")
    wrapped = {"ms_prefix": "albert.albert.", "heads": "wrapper"}
    return [
        entry("AlbertModel", model.AlbertModel(config, True), "AlbertModel", layout={"ms_prefix": "", "hf_prefix": ""}),
        entry("AlbertCLSModel", tasks.AlbertCLSModel(config, True, 5), "AlbertForSequenceClassification"),
        entry("AlbertSquadModel", tasks.AlbertSquadModel(config, True, 2), "AlbertForQuestionAnswering",
              own=NO_ALBERT_POOLER),
        entry("AlbertCLS", wrappers.AlbertCLS(config, True, 5), "AlbertForSequenceClassification", layout=wrapped),
    ]  # fmt: skip


def entry(
    network: str, net: object, hf: str, *, layout: Mapping[str, str] | None = None, own: Mapping[str, str] | None = None
) -> Entry:
    """Describe a network; the labels of transformers' class are the network's."""
    config, fields = {"B": ("BertConfig", SIZES), "G": ("GPT2Config", GPT2), "A": ("AlbertConfig", ALBERT)}[hf[0]]
    labels = {} if "QuestionAnswering" in hf or hf[0] == "G" else LABELS
    parameters = {p.name: list(p.shape) for p in net.get_parameters()}  # type: ignore[attr-defined]
    print(f"{network}: {len(parameters)} parameters")
    said = {"network": network, "hf": hf, "config": config, "fields": {**fields, **labels}}
    return {**said, "layout": dict(layout or {}),
            "own": dict(own or {}), "parameters": parameters}  # fmt: skip


def main(models: Path, families: list[str]) -> None:
    """Write a file for each family; print what was written."""
    import mindspore

    folders = {"bert": "official/nlp/Bert", "gpt2": "research/nlp/gpt2", "albert": "research/nlp/albert",
               "gpt": "official/nlp/GPT"}  # fmt: skip
    for family in families:
        for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
            del sys.modules[name]
        sys.path.insert(0, str(models / folders[family]))
        rows = ",\n".join(json.dumps(item) for item in BUILD[family]())
        sys.path.pop(0)
        head = f'"release": "mindspore-ai/models eab643f51", "mindspore": "{mindspore.__version__}"'
        (OUT / f"{family}_modelzoo.2023-07.json").write_text(f'{{{head}, "networks": [\n{rows}\n]}}\n')


BUILD = {"bert": bert, "gpt2": gpt2, "albert": albert, "gpt": gpt}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
