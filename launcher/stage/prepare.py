"""Staging without the network, on CPU: a model from a config, tokenised data. ``python -m launcher.stage.prepare REQUEST``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.stage.child import Say, serve
from launcher.stage.documents import Documents, Selection, local_of, read_documents, texts
from launcher.stage.samples import HISTOGRAM_BIN_TOKENS, Tally, concatenate, cut, write_samples
from launcher.stage.sources import content_sha, tokenizer_sha

LIBRARIES = ("tokenizers", "transformers", "datasets", "pyarrow")


def prepare(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Carry out a request in its folder and give the facts."""
    return {"model": prepare_model, "data": prepare_data}[request["task"]](request, say)


def prepare_model(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """A random start: tokenizer from the training documents, weights from the seed."""
    from launcher.stage.random_start import model_config, save_model, train_tokenizer

    folder = Path(request["folder"])
    config = model_config(request["config"])
    documents = _documents(request, say)
    say(f"training a tokenizer of {config.vocab_size} entries on {len(documents.train_order)} documents")
    tokenizer = train_tokenizer(texts(documents.train, documents.train_order), config.vocab_size)
    parameters = save_model(config, tokenizer, request["seed"], folder)
    say(f"drew {parameters:,} parameters with seed {request['seed']}")
    return {
        "tokenizer_sha": tokenizer_sha(folder),
        "parameters": parameters,
        "tokenizer_entries": len(tokenizer),
        "versions": _versions("torch"),
    }


def prepare_data(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Tokenised samples of the training and, where there are some, the evaluation documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], trust_remote_code=False)
    eos = tokenizer.eos_token_id
    packing, sequence_length = request["packing"], request["sequence_length"]
    if eos is None and (request["append_eos"] or packing == "concatenate"):
        raise UsageError("the tokenizer has no EOS token", key="data.append_eos", hint="append_eos: false (and packing: none or flatten)")
    documents = _documents(request, say)
    if not documents.eval_order and request["needs_eval"]:
        raise no_evaluation(request["selection"]["split"])

    def tokenised(of: Any, order: list[int]) -> Any:
        for batch in texts(of, order):
            yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def write(of: Any, order: list[int], name: str) -> Tally:
        tally = Tally()
        stream = tokenised(of, order)
        if packing == "concatenate":
            samples = concatenate(stream, sequence_length, eos, tally)
        else:
            samples = cut(stream, sequence_length, eos if request["append_eos"] else None, tally)
        write_samples(
            samples, Path(request["folder"]) / name, Path(request["scratch"]), tally, lambda: say(f"{name}: {tally.samples} samples")
        )
        return tally

    train = write(documents.train, documents.train_order, "train")
    evaluation = write(documents.eval, documents.eval_order, "eval") if documents.eval_order else Tally()
    say(f"{train.samples} training samples ({train.targets:,} targets), {evaluation.samples} for the evaluation")
    return {
        "train_samples": train.samples,
        "eval_samples": evaluation.samples,
        "train_targets": train.targets,
        "eval_targets": evaluation.targets,
        "cut_share": train.cut_tokens / train.tokens if train.tokens else 0.0,
        "length_histogram": {"bin_tokens": HISTOGRAM_BIN_TOKENS, "counts": train.length_histogram},
        "dropped": asdict(documents.dropped),
        "train": _counts(train),
        "eval": _counts(evaluation),
        "data_sha": request["data_sha"] or content_sha(local_of(request["source"])),
        "tokenizer_sha": tokenizer_sha(Path(request["tokenizer"])),
        "versions": _versions(),
    }


def no_evaluation(split: str) -> UsageError:
    return UsageError(
        f"the data has no split {split!r} and nothing is held out",
        key="data.eval_share",
        code="no-evaluation",
        hint="set data.eval_share (0.05 holds out one in twenty), another evaluation.split, or evaluation.every: never",
    )


def _documents(request: dict[str, Any], say: Say) -> Documents:
    say("reading the documents")
    documents = read_documents(request["source"], Selection(**request["selection"]), Path(request["scratch"]))
    if not documents.train_order:
        raise UsageError("no training document is left: all are empty, not UTF-8, or held out", key="data", code="no-samples")
    asked = request["selection"]["num_samples"]
    if asked is not None and len(documents.train) < asked:
        say(f"data.num_samples asks for {asked}, the data has {len(documents.train)}: all are taken")
    return documents


def _counts(tally: Tally) -> dict[str, Any]:
    return {name: value for name, value in asdict(tally).items() if name != "length_histogram"}


def _versions(*more: str) -> dict[str, str]:
    return {name: version(name) for name in (*LIBRARIES, *more)}


if __name__ == "__main__":
    sys.exit(serve(prepare))
