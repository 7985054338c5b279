"""Staging: model, tokenizer and tokenised data made ready before any GPU is asked for. Standard library only on the host.

    models/<name>-<key>/    config, safetensors, tokenizer          datasets/<name>-<key>/  train/ and eval/: tokenised samples
    raw/<name>-<key>/       a hub data set's text, as fetched       refs/<name>-<key>/      which commit a branch was when first staged

A key is the hash of everything that determines the folder's content; a folder with ``facts.json`` is finished and never changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import MissingError, UsageError
from launcher.plan import Container, Staged
from launcher.stage.child import Where
from launcher.stage.shelf import make, read_facts
from launcher.stage.sources import (
    Local,
    content_sha,
    find_local,
    find_model,
    find_stdlib,
    fingerprint,
    known_sha,
    leaves,
    tokenizer_sha,
)

if TYPE_CHECKING:
    from launcher.preset.schema import Preset
    from launcher.preset.stack import Stack

LAYOUT_VERSION = 1
"""Part of every key: raised when what is written changes its meaning."""

PROBE = """
import json, platform, sysconfig
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version(), "stdlib": sysconfig.get_paths()["stdlib"]}
for name in ("torch", "transformers", "tokenizers", "datasets", "pyarrow"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


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
    return _staged(_Shop(Where(container, python, environ, data, progress), data), preset, stack)


def find_staged(
    preset: Preset, stack: Stack | None, container: Container, data: Path, *, python: str, environ: Mapping[str, str]
) -> Staged | None:
    """What ``stage`` would give, where all of it is there already; else None. Makes nothing, reads no data. Errors: UsageError."""
    data = data.resolve()
    try:
        return _staged(_Shop(Where(container, python, environ, data, lambda line: None), data, look_only=True), preset, stack)
    except _NotThereError:
        return None


def local_fingerprints(preset: Preset) -> dict[str, str]:
    """``data`` and ``model``, as far as they are local folders or files, each with its fingerprint. Errors: UsageError."""
    found = {}
    if preset.data.path not in (None, "stdlib"):
        assert preset.data.path is not None
        found["data"] = fingerprint(find_local(Path(preset.data.path).expanduser().resolve(), preset.data.glob))
    if preset.model.path is not None:
        found["model"] = fingerprint(find_model(Path(preset.model.path).expanduser().resolve(), "model.path"), key="model.path")
    return found


class _NotThereError(Exception):
    """Something would have to be made."""


def _staged(shop: _Shop, preset: Preset, stack: Stack | None) -> Staged:
    container, python, environ = shop.where.container, shop.where.python, shop.where.environ
    if preset.data.packing == "documents":
        raise UsageError("packing: documents is not there yet", key="data.packing", hint="flatten, concatenate or none")
    software = _software(stack, container, python, environ)
    texts = _texts(shop, preset, container, software)
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
class _Texts:
    """Where the documents come from and which are used."""

    source: dict[str, Any]
    """As ``documents.read_documents`` takes it."""
    sha: str | None
    """Hash of the content; None when only the container knows (its standard library)."""
    commit: str
    selection: dict[str, Any]
    label: str

    @property
    def reads(self) -> list[Path]:
        return [Path(self.source["root"])] if self.source.get("root") else []


@dataclass(frozen=True)
class _ModelFolder:
    folder: Path
    tokenizer_sha: str
    commit: str = ""
    sha: str = ""
    """Hash of the content of a folder that the user brings, which is used where it lies."""


@dataclass(frozen=True)
class _Shop:
    """The data folder and the processes that fill it."""

    where: Where
    data: Path
    look_only: bool = False
    """What is not there is not made: ``_NotThereError``."""

    def sha(self, local: Local, key: str = "data.path") -> str:
        """Hash of the content of something local."""
        cache = self.data / "hashes"
        if not self.look_only:
            return content_sha(local, cache, key=key)
        known = known_sha(local, cache, key=key)
        if known is None:
            raise _NotThereError(key)
        return known

    def make(
        self,
        shelf: Literal["models", "datasets", "raw", "refs"],
        label: str,
        module: Literal["fetch", "prepare"],
        request: Mapping[str, Any],
        *,
        key: Mapping[str, Any],
        reads: Sequence[Path] = (),
    ) -> tuple[Path, dict[str, Any]]:
        """The finished folder for a key, made by a process from the request unless it is there, and its facts."""
        name = f"{_slug(label)}-{_hash({'layout': LAYOUT_VERSION, **key})[:16]}"

        def build(folder: Path) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".tmp-{name}-") as scratch:
                full = {**request, "folder": str(folder), "scratch": scratch}
                facts = self.where.run(module, full, scratch=Path(scratch), log=self.data / "logs" / f"{name}.log", reads=reads)
            return {**facts, "key": dict(key)}

        folder = self.data / shelf / name
        if self.look_only:
            facts = read_facts(folder)
            if facts is None:
                raise _NotThereError(name)
            return folder, facts
        return folder, make(folder, build, self.where.say, resumable=request["task"] == "model" and module == "fetch")

    def commit(self, kind: Literal["model", "dataset"], name: str, revision: str) -> str:
        """The commit of a hub name: the one that was found first, so that a branch that moves does not move what is staged.

        Removing its folder in ``refs/`` looks again.
        """
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            return revision
        request = {"task": "resolve", "kind": kind, "name": name, "revision": revision}
        _, facts = self.make("refs", name, "fetch", request, key=request)
        return str(facts["commit"])


def _software(stack: Stack | None, container: Container, python: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """What tokenises and draws weights: the image, or what the interpreter has installed. Errors: MissingError."""
    if container.use == "apptainer":
        if container.identity is not None:
            return {"image": container.identity}
        if stack is not None:
            return {"stack": dict(stack.packages)}
        assert container.image is not None, "apptainer needs an image"
        state = Path(container.image).stat()
        return {"image": container.image, "bytes": state.st_size, "changed_ns": state.st_mtime_ns}
    environ = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [python, "-s", "-c", PROBE], env=environ, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(
            f"{python} does not run: {error}", code="no-interpreter", hint="give a Python with the stack's packages"
        ) from error
    found: dict[str, Any] = json.loads(done.stdout)
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise MissingError(
            f"{python} has no {', '.join(missing)}", code="missing-package", hint="pip install 'ftlaunch[train]', or stage in a container"
        )
    return found


def _texts(shop: _Shop, preset: Preset, container: Container, software: Mapping[str, Any]) -> _Texts:
    data = preset.data
    selection = {
        "text_column": data.text_column,
        "num_samples": data.num_samples,
        "seed": preset.training.seed,
        "eval_share": data.eval_share,
        "split": preset.evaluation.split,
    }
    if data.name is not None:
        commit = shop.commit("dataset", data.name, data.revision)
        request = {
            "task": "data",
            "name": data.name,
            "subset": data.subset,
            "commit": commit,
            "text_column": data.text_column,
            "split": preset.evaluation.split,
        }
        folder, facts = shop.make("raw", data.name, "fetch", request, key=request)
        return _Texts({"kind": "dataset", "root": str(folder), "splits": facts["splits"]}, commit, commit, selection, data.name)
    assert data.path is not None, "the schema demands a name or a path"
    if data.path == "stdlib" and container.use == "apptainer":
        return _Texts({"kind": "stdlib"}, None, "", selection, "stdlib")
    if data.path == "stdlib":
        local, label = find_stdlib(Path(software["stdlib"])), "stdlib"
    else:
        path = Path(data.path).expanduser().resolve()
        local, label = find_local(path, data.glob), path.name
        if container.use == "apptainer":
            _refuse_outside(local)
    sha = shop.sha(local)
    return _Texts(asdict(local), sha, "", selection, label)


def _model(shop: _Shop, preset: Preset, container: Container, software: Mapping[str, Any], texts: _Texts) -> _ModelFolder:
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
            _refuse_outside(files, "model.path")
        return _ModelFolder(folder, tokenizer_sha(folder), sha=shop.sha(files, "model.path"))
    assert model.config is not None, "the schema demands a source"
    request = {"task": "model", "config": model.config, "seed": preset.training.seed, "selection": texts.selection}
    key = {**request, "source": _identity(texts), "software": dict(software)}
    label = str(model.config["model_type"])
    folder, facts = shop.make("models", label, "prepare", {**request, "source": texts.source}, key=key, reads=texts.reads)
    return _ModelFolder(folder, facts["tokenizer_sha"])


def _samples(shop: _Shop, preset: Preset, software: Mapping[str, Any], texts: _Texts, model: _ModelFolder) -> tuple[Path, dict[str, Any]]:
    settings = {
        "task": "data",
        "selection": texts.selection,
        "packing": "concatenate" if preset.data.packing == "concatenate" else "none",  # flatten has the samples of none
        "sequence_length": preset.training.sequence_length,
        "append_eos": preset.data.append_eos,
    }
    key = {**settings, "source": _identity(texts), "tokenizer": model.tokenizer_sha, "software": dict(software)}
    request = {
        **settings,
        "source": texts.source,
        "tokenizer": str(model.folder),
        "needs_eval": preset.evaluation.every != "never",
        "data_sha": texts.sha,
    }
    return shop.make("datasets", texts.label, "prepare", request, key=key, reads=[*texts.reads, model.folder])


def _check(preset: Preset, facts: Mapping[str, Any]) -> None:
    """What the data must have for this preset, beyond what its key says. Errors: UsageError."""
    samples, batch = facts["train_samples"], preset.training.effective_batch
    if samples == 0:
        hint = "fewer tokens than one block: a shorter training.sequence_length" if preset.data.packing == "concatenate" else None
        raise UsageError("no training sample is left", key="training.sequence_length", code="no-samples", hint=hint)
    if samples < batch:
        hint = f"at most {samples}, or a larger data.num_samples where the data has more"
        raise UsageError(
            f"{batch} is more than the {samples} training samples", key="training.effective_batch", code="too-few-samples", hint=hint
        )
    if preset.evaluation.every != "never" and facts["eval_samples"] == 0:
        from launcher.stage.prepare import no_evaluation

        raise no_evaluation(preset.evaluation.split)


def _identity(texts: _Texts) -> dict[str, Any]:
    """What of a source goes into keys: its content, not where it lies."""
    return {"kind": texts.source["kind"], "sha": texts.sha}


def _refuse_outside(local: Local, key: str = "data.path") -> None:
    for name in local.files:
        if leaves(Path(local.root), name):
            raise UsageError(
                f"{name} is a link out of {local.root}, which the container would not see", key=key, hint="copy the folder with cp -rL"
            )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "data"


__all__ = ["find_staged", "local_fingerprints", "read_facts", "stage"]
