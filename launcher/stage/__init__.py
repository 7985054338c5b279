"""Staging: model, tokenizer and tokenised data made ready before any GPU is asked for. Standard library only on the host.

    models/<name>-<key>/    config, safetensors, tokenizer          datasets/<name>-<key>/  train/ and eval/: tokenised samples
    raw/<name>-<key>/       a hub data set's text, as fetched       refs/<name>-<key>/      which commit a branch was when first staged

A key is the hash of everything that determines the folder's content; a folder with ``facts.json`` is finished and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.plan import Container, Staged
from launcher.stage.child import Where
from launcher.stage.shelf import read_facts
from launcher.stage.shop import NotThereError, Shop, refuse_outside, software_of
from launcher.stage.sources import combined_sha, find_local, find_model, fingerprint, tokenizer_sha
from launcher.stage.texts import Texts, find_texts

if TYPE_CHECKING:
    from launcher.preset.schema import Preset
    from launcher.preset.stack import Stack

FIM_RATE, FIM_SPM_RATE = 0.5, 0.5
"""Where the preset says none: StarCoder's."""


def stage(
    preset: Preset,
    stack: Stack | None,
    container: Container,
    data: Path,
    *,
    python: str,
    environ: Mapping[str, str],
    progress: Callable[[str], None] = lambda line: None,
) -> Staged:
    """Make ready what the preset trains on; what is there already is only looked up.

    ``stack``: None for an image that the user brings. ``data``: the folder that keeps it.
    ``python``: the interpreter to stage with when there is no container. ``progress`` takes lines.
    Errors: UsageError, MissingError, ActionError.
    """
    data = data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    return _staged(Shop(Where(container, python, environ, data, progress), data), preset, stack)


def find_staged(
    preset: Preset, stack: Stack | None, container: Container, data: Path, *, python: str, environ: Mapping[str, str]
) -> Staged | None:
    """What ``stage`` would give, where all of it is there already; else None. Makes nothing, reads no data. Errors: UsageError."""
    data = data.resolve()
    try:
        return _staged(Shop(Where(container, python, environ, data, lambda line: None), data, look_only=True), preset, stack)
    except NotThereError:
        return None


def local_fingerprints(preset: Preset) -> dict[str, str]:
    """``data`` and ``model``, as far as they are local folders or files, each with its fingerprint. Errors: UsageError."""
    found = {}
    several = [(number, source) for number, source in enumerate(preset.data.several) if source.path not in (None, "stdlib")]
    if several:
        marks = []
        for number, source in several:
            assert source.path is not None and source.glob is not None, "Data.several fills in what a source left out"
            key = "data" if preset.data.sources is None else f"data.sources.{number}"
            marks.append(fingerprint(find_local(Path(source.path).expanduser().resolve(), source.glob, key), key=f"{key}.path"))
        found["data"] = combined_sha(marks)
    if preset.model.path is not None:
        found["model"] = fingerprint(find_model(Path(preset.model.path).expanduser().resolve(), "model.path"), key="model.path")
    return found


def _staged(shop: Shop, preset: Preset, stack: Stack | None) -> Staged:
    container, python, environ = shop.where.container, shop.where.python, shop.where.environ
    software = software_of(stack, container, python, environ)
    texts = find_texts(shop, preset, container, software)
    model = _model(shop, preset, container, software, texts)
    folder, facts = _samples(shop, preset, software, texts, model)
    _check(preset, facts)
    histogram = facts.get("length_histogram", {})
    return Staged(
        model=str(model.folder),
        data=str(folder),
        train_samples=facts["train_samples"],
        eval_samples=facts["eval_samples"],
        train_targets=facts["train_targets"],
        data_sha=facts["data_sha"],
        model_revision=model.commit,
        data_revision=texts.commit,
        model_sha=model.sha,
        length_bin_tokens=histogram.get("bin_tokens", 0),
        length_counts=list(histogram.get("counts", ())),
        cut_share=facts.get("cut_share", 0.0),
    )


@dataclass(frozen=True)
class _ModelFolder:
    folder: Path
    tokenizer_sha: str
    commit: str = ""
    sha: str = ""
    """Hash of the content of a folder that the user brings, which is used where it lies."""


def _model(shop: Shop, preset: Preset, container: Container, software: Mapping[str, Any], texts: Texts) -> _ModelFolder:
    model = preset.model
    if model.name is not None:
        commit = shop.commit("model", model.name, model.revision)
        request: dict[str, Any] = {"task": "model", "name": model.name, "commit": commit}
        folder, facts = shop.make("models", model.name, "fetch", request, key=request)
        return _ModelFolder(folder, facts["tokenizer_sha"], commit)
    if model.path is not None:
        folder = Path(model.path).expanduser().resolve()
        files = find_model(folder, "model.path")
        if container.use == "apptainer":
            refuse_outside(files, "model.path")
        return _ModelFolder(folder, tokenizer_sha(folder), sha=shop.sha(files, "model.path"))
    assert model.config is not None, "the schema demands a source"
    request = {"task": "model", "config": model.config, "seed": preset.training.seed, "selection": texts.selection}
    key = {**request, "sources": texts.identity, "software": dict(software)}
    label = str(model.config["model_type"])
    folder, facts = shop.make("models", label, "prepare", {**request, "sources": texts.sources}, key=key, reads=texts.reads)
    return _ModelFolder(folder, facts["tokenizer_sha"])


def _samples(shop: Shop, preset: Preset, software: Mapping[str, Any], texts: Texts, model: _ModelFolder) -> tuple[Path, dict[str, Any]]:
    data = preset.data
    settings = {
        "task": "data",
        "selection": texts.selection,
        "packing": "none" if data.packing == "flatten" else data.packing,  # flatten has the samples of none
        "sequence_length": preset.training.sequence_length,
        "long_documents": data.long_documents,
        "append_eos": data.append_eos,
        "fim": {
            "rate": FIM_RATE if data.fim_rate is None else data.fim_rate,
            "spm_rate": FIM_SPM_RATE if data.fim_spm_rate is None else data.fim_spm_rate,
        },
    }
    key = {**settings, "sources": texts.identity, "tokenizer": model.tokenizer_sha, "software": dict(software)}
    request = {
        **settings,
        "sources": texts.sources,
        "tokenizer": str(model.folder),
        "needs_eval": preset.evaluation.every != "never",
    }
    return shop.make("datasets", texts.label, "prepare", request, key=key, reads=[*texts.reads, model.folder])


def _check(preset: Preset, facts: Mapping[str, Any]) -> None:
    """What the data must have for this preset, beyond what its key says. Errors: UsageError."""
    samples, batch = facts["train_samples"], preset.training.effective_batch
    if samples == 0:
        longer = "no document has a target within it: a longer training.sequence_length, or longer documents"
        hint = "fewer tokens than one block: a shorter training.sequence_length" if preset.data.packing == "concatenate" else longer
        raise UsageError("no training sample is left", key="training.sequence_length", code="no-samples", hint=hint)
    if samples < batch:
        hint = f"at most {samples}, or a larger data.num_samples where the data has more"
        rows = " (rows of packed documents)" if preset.data.packing == "documents" else ""
        raise UsageError(
            f"{batch} is more than the {samples} training samples{rows}", key="training.effective_batch", code="too-few-samples", hint=hint
        )
    if preset.evaluation.every != "never" and facts["eval_samples"] == 0:
        from launcher.stage.prepare import no_evaluation

        raise no_evaluation(preset.evaluation.split)


__all__ = ["find_staged", "local_fingerprints", "read_facts", "stage"]
