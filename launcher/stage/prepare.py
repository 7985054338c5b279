"""Staging without the network, on CPU: a model from a config, tokenised data. ``python -m launcher.stage.prepare REQUEST``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.serve import Say, serve
from launcher.stage.documents import Documents, Selection, Source, Split, local_of, read_documents
from launcher.stage.fim import MARKS
from launcher.stage.formats import MASKED, plain_text
from launcher.stage.samples import HISTOGRAM_BIN_TOKENS, Tally, concatenate, cut, pack, write_samples
from launcher.stage.sources import combined_sha, content_sha, tokenizer_sha
from launcher.stage.tokens import Formats

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
    say(f"training a tokenizer of {config.vocab_size} entries on {len(documents.train)} documents")
    fim = MARKS[0] if any(source["format"] == "fim" for source in request["sources"]) else None
    marks = () if fim is None else (fim.prefix, fim.middle, fim.suffix)
    tokenizer = train_tokenizer(_words(documents.train), config.vocab_size, marks)
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
        raise UsageError(
            "the tokenizer has no EOS token", key="data.append_eos", hint="append_eos: false (and packing: none, flatten or documents)"
        )
    split = request["long_documents"] == "split"
    formats = Formats(
        tokenizer,
        {source["format"] for source in request["sources"]},
        append_eos=request["append_eos"],
        seed=request["selection"]["seed"],
        fim={**request["fim"], "split": split},
        room=None if packing == "concatenate" else sequence_length,
    )
    documents = _documents(request, say)
    if not len(documents.eval) and request["needs_eval"]:
        raise no_evaluation(request["selection"]["split"])
    masked = any(source["format"] in MASKED for source in request["sources"])

    def write(of: Split, name: str) -> Tally:
        tally = Tally()
        stream = formats.tokens(of.documents(), name)
        if packing == "concatenate":
            samples = concatenate(stream, sequence_length, eos, tally)
        else:
            samples = cut(stream, sequence_length, tally, split=split)
            samples = pack(samples, sequence_length) if packing == "documents" else samples
        folder, scratch = Path(request["folder"]) / name, Path(request["scratch"])
        packed = packing == "documents"
        write_samples(samples, folder, scratch, tally, lambda: say(f"{name}: {tally.samples} samples"), masked=masked, packed=packed)
        return tally

    train = write(documents.train, "train")
    evaluation = write(documents.eval, "eval") if len(documents.eval) else Tally()
    say(f"{train.samples} training samples ({train.targets:,} targets), {evaluation.samples} for the evaluation")
    if packing == "documents" and train.samples:
        say(f"{sum(train.length_histogram)} documents in {train.samples} rows, {_fill(train, sequence_length):.1%} full")
    if train.short_samples:
        say(f"{train.short_samples} of {train.documents} documents were dropped: within {sequence_length} tokens they have no target")
    return {
        "train_samples": train.samples,
        "eval_samples": evaluation.samples,
        "train_targets": train.targets,
        "eval_targets": evaluation.targets,
        "cut_share": train.cut_tokens / train.tokens if train.tokens else 0.0,
        "fill_share": _fill(train, sequence_length),
        "length_histogram": {"bin_tokens": HISTOGRAM_BIN_TOKENS, "counts": train.length_histogram},
        "dropped": asdict(documents.dropped),
        "sources": [
            {"label": source["label"], "weight": source["weight"], **asdict(part), "passes": part.passes}
            for source, part in zip(request["sources"], documents.parts)
        ],
        "train": _counts(train),
        "eval": _counts(evaluation),
        "data_sha": combined_sha([source["sha"] or content_sha(local_of(source["source"])) for source in request["sources"]]),
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
    names = ("source", "format", "columns", "weight", "label", "key")
    sources = [Source(**{name: source[name] for name in names}) for source in request["sources"]]
    documents = read_documents(sources, Selection(**request["selection"]), Path(request["scratch"]))
    if not len(documents.train):
        raise UsageError("no training document is left: all are empty, not UTF-8, or held out", key="data", code="no-samples")
    asked = request["selection"]["num_samples"]
    if len(sources) == 1:
        if asked is not None and documents.parts[0].documents < asked:
            say(f"data.num_samples asks for {asked}, the data has {documents.parts[0].documents}: all are taken")
        return documents
    for source, part in zip(sources, documents.parts):
        often = f", {part.passes:.3g} times each" if part.passes > 1 else ""
        share = part.train / len(documents.train)
        say(f"{source.label}: {part.train} of {len(documents.train)} training documents ({share:.1%}), from {part.documents}{often}")
    return documents


def _words(split: Split) -> Iterator[list[str]]:
    for batch in split.documents():
        yield [plain_text(format, document) for format, document in batch]


def _fill(tally: Tally, sequence_length: int) -> float:
    return tally.kept_tokens / (tally.samples * sequence_length) if tally.samples else 0.0


def _counts(tally: Tally) -> dict[str, Any]:
    return {name: value for name, value in asdict(tally).items() if name != "length_histogram"}


def _versions(*more: str) -> dict[str, str]:
    return {name: version(name) for name in (*LIBRARIES, *more)}


if __name__ == "__main__":
    sys.exit(serve(prepare))
