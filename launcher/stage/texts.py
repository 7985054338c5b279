"""The sources of a preset's data as a staging process takes them: found or fetched, with the hash of their content. Host side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.plan import Container
from launcher.stage.formats import COLUMNS
from launcher.stage.shop import Shop, refuse_outside
from launcher.stage.sources import Local, find_local, find_stdlib

if TYPE_CHECKING:
    from launcher.preset.schema import Preset, Source


@dataclass(frozen=True)
class Texts:
    """Where the documents come from and which are used."""

    sources: list[dict[str, Any]]
    """Each as ``documents.Source`` has it, with ``sha``: the hash of its content; None when only the container knows (its own
    standard library)."""
    commits: list[str]
    """On the hub; empty for what is local."""
    selection: dict[str, Any]
    """As ``documents.Selection`` has it."""

    @property
    def label(self) -> str:
        more = len(self.sources) - 1
        return f"{self.sources[0]['label']}{f'-and-{more}-more' if more else ''}"

    @property
    def commit(self) -> str:
        """The commits of all sources, in their order, with spaces between; empty where all are local."""
        return " ".join(commit for commit in self.commits if commit)

    @property
    def reads(self) -> list[Path]:
        return [Path(source["source"]["root"]) for source in self.sources if source["source"].get("root")]

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What of the sources goes into keys: their content and what is made of it, not where they lie."""
        several = len(self.sources) > 1
        kept = ("sha", "format", "columns", "subset", *(("weight",) if several else ()))
        return [{"kind": source["source"]["kind"], **{name: source[name] for name in kept}} for source in self.sources]


def find_texts(shop: Shop, preset: Preset, container: Container, software: Mapping[str, Any]) -> Texts:
    """Errors: UsageError for what is not there, ActionError when the hub cannot be reached."""
    data, sources, commits = preset.data, [], []
    for number, source in enumerate(data.several):
        key = "data" if data.sources is None else f"data.sources.{number}"
        found, commit = _find(shop, preset, source, key, container, software)
        sources.append(found)
        commits.append(commit)
    selection = {
        "num_samples": data.num_samples,
        "seed": preset.training.seed,
        "eval_share": data.eval_share,
        "split": preset.evaluation.split,
    }
    return Texts(sources, commits, selection)


def _find(
    shop: Shop, preset: Preset, source: Source, key: str, container: Container, software: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    assert source.format is not None and source.glob is not None, "Data.several fills in what a source left out"
    columns = {name: getattr(source, f"{name}_column") for name in COLUMNS[source.format]}
    rest = {"format": source.format, "columns": columns, "subset": source.subset, "weight": source.weight, "key": key}
    if source.name is not None:
        commit = shop.commit("dataset", source.name, source.revision)
        request = {
            "task": "data",
            "name": source.name,
            "subset": source.subset,
            "commit": commit,
            "columns": columns,
            "split": preset.evaluation.split,
        }
        folder, facts = shop.make("raw", source.name, "fetch", request, key=request)
        where = {"kind": "dataset", "root": str(folder), "splits": facts["splits"]}
        return {"source": where, "sha": commit, "label": source.name, **rest}, commit
    assert source.path is not None, "the schema demands a name or a path"
    if source.path == "stdlib" and container.use == "apptainer":
        return {"source": {"kind": "stdlib"}, "sha": None, "label": "stdlib", **rest}, ""
    local: Local
    if source.path == "stdlib":
        local, label = find_stdlib(Path(software["stdlib"])), "stdlib"
    else:
        path = Path(source.path).expanduser().resolve()
        local, label = find_local(path, source.glob, key), path.name
        if container.use == "apptainer":
            refuse_outside(local, f"{key}.path")
    return {"source": asdict(local), "sha": shop.sha(local, f"{key}.path"), "label": label, **rest}, ""
