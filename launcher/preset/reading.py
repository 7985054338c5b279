"""Files that users write → validated values, each with the place where it was written. The only part that opens presets, sites,
hardware, stacks, model facts and the user's configuration. What follows from them is the planner's business.

A value comes, last one wins, from the file that ``extends`` names, the file itself, ``--set``, the options of the command line.
Mappings are laid over each other entry by entry, lists and values replace; null takes a key away, so that its default holds. Of
exclusive choices (model name, path, config; data name, path; adapter; stack; base) the last one made replaces the others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from launcher.errors import Finding, UsageError
from launcher.plan import BIND
from launcher.preset.complaints import complaints, nearest, shown
from launcher.preset.config import UserConfig
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts, facts_of_config
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack
from launcher.preset.tree import Node, Where, merge, parse, places, plain, put, single, without_nulls
from launcher.preset.variables import with_variables
from launcher.shipped import shipped

T = TypeVar("T", bound=BaseModel)

MAX_BYTES = 1_000_000
MAX_EXTENDS = 8

COMMAND_LINE = "command line"
SET = "--set"


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What was read, and where each value of it was written."""

    value: T
    text: str
    """The file, verbatim."""
    file: Path
    provenance: Mapping[str, Where]
    """Dotted key → file and line. Defaults are not in it."""

    def where(self, key: str) -> Where:
        """Where ``key`` was written, else the nearest mapping around it, else the file."""
        while key:
            if key in self.provenance:
                return self.provenance[key]
            key = key.rpartition(".")[0]
        return Where(str(self.file))


@dataclass(frozen=True)
class _Kind(Generic[T]):
    noun: str
    schema: type[T]
    folder: str
    """Below the shipped data and, but for presets, below the user's configuration."""


_PRESET = _Kind("preset", Preset, "presets")
_SITE = _Kind("site", Site, "presets/sites")
_HARDWARE = _Kind("hardware", Hardware, "presets/hardware")
_STACK = _Kind("stack", Stack, "containers")
_MODEL = _Kind("model", ModelFacts, "presets/models")


def read_preset(name: str, *, settings: Sequence[str] = (), options: Mapping[str, object] | None = None) -> Loaded[Preset]:
    """A preset by path, else by the name or path of a shipped one (``starcoder2-15b``, ``presets/starcoder2-15b.yaml``).

    ``settings``: ``key.of.it=VALUE``, the value read as YAML 1.2. ``options``: dotted key → value from the command line's own
    options, None where it was not given. Relative paths in it count from the file that says them.
    Errors: UsageError with everything that is wrong.
    """
    findings: list[Finding] = []
    layers = [_setting(text, findings) for text in settings]
    for key, value in (options or {}).items():
        if value is not None:
            layers.append(single(tuple(key.split(".")), _node(value, Where(COMMAND_LINE))))
    return _read(_PRESET, _find(_PRESET, name, None), [layer for layer in layers if layer is not None], findings)


def read_site(name: str, *, home: Path | None = None, at: Where | None = None, environ: Mapping[str, str] | None = None) -> Loaded[Site]:
    """By path, else from ``~/.config/ftlaunch/sites``, else shipped. ``at``: where it was named, for the message.

    Variables in binds and in the container's environment are replaced from ``environ``, by default this process's.
    """
    return _with_variables(_read(_SITE, _find(_SITE, name, home or Path.home(), at)), os.environ if environ is None else environ)


def read_hardware(name: str, *, home: Path | None = None, at: Where | None = None) -> Loaded[Hardware]:
    """By path, else from ``~/.config/ftlaunch/hardware``, else shipped."""
    return _read(_HARDWARE, _find(_HARDWARE, name, home or Path.home(), at))


def read_stack(name: str, *, home: Path | None = None, at: Where | None = None) -> Loaded[Stack]:
    """By path, else from ``~/.config/ftlaunch/containers``, else shipped; its lock lies beside the file."""
    return _read(_STACK, _find(_STACK, name, home or Path.home(), at))


def read_model_facts(name: str, *, home: Path | None = None) -> Loaded[ModelFacts]:
    """By path, else by file name from ``~/.config/ftlaunch/models``, else shipped."""
    return _read(_MODEL, _find(_MODEL, name, home or Path.home()))


def model_facts(preset: Preset, *, home: Path | None = None) -> ModelFacts | None:
    """Facts of the preset's model: from a facts file, its folder's config.json, or the config it is made from; None where unknown."""
    if preset.model.config is not None:
        return facts_of_config(preset.model.config)
    if preset.model.path is not None:
        try:
            config = json.loads((Path(preset.model.path) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return facts_of_config(config) if isinstance(config, dict) else None
    assert preset.model.name is not None
    stem = preset.model.name.rpartition("/")[2].lower()
    if stem not in _names(_MODEL, home or Path.home()):
        return None
    facts = read_model_facts(stem, home=home).value
    return facts if facts.name == preset.model.name else None


def read_config(*, home: Path | None = None) -> Loaded[UserConfig] | None:
    """``~/.config/ftlaunch/config.yaml``; None when there is none."""
    path = user_folder(home or Path.home()) / "config.yaml"
    return _read(_Kind("configuration", UserConfig, ""), path) if path.is_file() else None


def user_folder(home: Path) -> Path:
    return home / ".config" / "ftlaunch"


def shipped_presets() -> list[str]:
    """Names of the shipped presets."""
    return _names(_PRESET, None)


def locate(findings: Sequence[Finding], preset: Loaded[Preset]) -> list[Finding]:
    """Findings of the planner, with the file and line of the preset where their key was written."""
    located = []
    for finding in findings:
        if finding.file is None and finding.key is not None:
            where = preset.where(finding.key)
            finding = replace(finding, file=where.file, line=where.line)
        located.append(finding)
    return located


def _read(kind: _Kind[T], file: Path, layers: Sequence[Node] = (), findings: list[Finding] | None = None) -> Loaded[T]:
    findings = [] if findings is None else findings
    text = _text(file)
    tree = _extended(kind, file, text, [], findings)
    if tree is None:
        raise UsageError(findings=findings)
    for layer in layers:
        tree = merge(tree, layer)
    tree = without_nulls(tree)
    if kind.schema is Preset:
        tree = _with_absolute_paths(tree, findings)
    try:
        value = kind.schema.model_validate(plain(tree), strict=True)
    except ValidationError as error:
        known, whole = {finding.key for finding in findings}, not findings
        found = complaints(error, tree, kind.schema)
        findings += [finding for finding in found if finding.key not in known and (whole or finding.code != "missing-key")]
    if findings:
        raise UsageError(findings=sorted(findings, key=lambda finding: (finding.file != str(file), finding.file or "", finding.line or 0)))
    return Loaded(value, text, file, places(tree))


def _with_variables(loaded: Loaded[Site], environ: Mapping[str, str]) -> Loaded[Site]:
    """Errors: UsageError for each variable that is not set, or that makes no bind."""
    findings: list[Finding] = []

    def filled(text: str, key: str, *, bind: bool) -> str:
        where = loaded.where(key)
        try:
            full = with_variables(text, environ, bind=bind)
        except LookupError as error:
            findings.append(Finding("error", "no-variable", f"{text}: ${error.args[0]} is not set", where.file, where.line, key))
            return text
        if bind and not BIND.fullmatch(full):
            findings.append(Finding("error", "bind", f"{text}: {full} has a path that is not absolute", where.file, where.line, key))
        return full

    def binds(room: str, texts: Sequence[str]) -> list[str]:
        return [filled(text, f"{room}.binds.{number}", bind=True) for number, text in enumerate(texts)]

    site = loaded.value
    env = {name: filled(text, f"container.env.{name}", bind=False) for name, text in site.container.env.items()}
    container = site.container.model_copy(update={"binds": binds("container", site.container.binds), "env": env})
    network = site.network.model_copy(update={"binds": binds("network", site.network.binds)})
    if findings:
        raise UsageError(findings=findings)
    return replace(loaded, value=site.model_copy(update={"container": container, "network": network}))


def _extended(kind: _Kind[T], file: Path, text: str, below: list[Path], findings: list[Finding]) -> Node | None:
    """The tree of ``file`` over that of the file which it extends. ``below``: the files that led here."""
    tree = parse(text, str(file), findings)
    if tree is None or not isinstance(tree.value, dict):
        if not any(finding.file == str(file) for finding in findings):
            what = "empty" if tree is None or tree.value is None else f"{shown(tree.value)} at its root"
            findings.append(Finding("error", "not-a-mapping", f"{what}: a {kind.noun} is a mapping of keys and values", str(file), 1))
        return None
    if "extends" not in tree.value:
        return tree
    entry = tree.value["extends"]
    tree = Node({name: node for name, node in tree.value.items() if name != "extends"}, tree.where)
    if not isinstance(entry.value, str):
        findings.append(
            _at("wrong-type", f"a file or the name of a shipped {kind.noun} is needed, not {shown(entry.value)}", entry, "extends")
        )
        return None
    chain = [*below, file]
    try:
        base = _find_base(kind, entry.value, file, entry.where)
    except UsageError as error:
        findings.extend(error.findings)
        return None
    if base.resolve() in [path.resolve() for path in chain]:
        findings.append(_at("extends-cycle", f"goes in a circle: {' → '.join(path.name for path in [*chain, base])}", entry, "extends"))
        return None
    if len(chain) > MAX_EXTENDS:
        findings.append(_at("extends-depth", f"more than {MAX_EXTENDS} files deep", entry, "extends"))
        return None
    try:
        lower = _extended(kind, base, _text(base), chain, findings)
    except UsageError as error:
        findings.extend(error.findings)
        return None
    return None if lower is None else merge(lower, tree)


def _find_base(kind: _Kind[T], name: str, file: Path, at: Where) -> Path:
    beside = file.parent / name
    return beside if "\0" not in name and beside.is_file() else _find_named(kind, name, None, at, "extends")


def _find(kind: _Kind[T], name: str, home: Path | None, at: Where | None = None) -> Path:
    path = Path(name)
    if (kind is _PRESET or "/" in name or name.endswith((".yaml", ".yml"))) and "\0" not in name and path.is_file():
        return path
    return _find_named(kind, name, home, at, kind.noun if at else None)


def _find_named(kind: _Kind[T], name: str, home: Path | None, at: Where | None, key: str | None) -> Path:
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix(f"{kind.folder}/"))
    names = _names(kind, home)
    if stem in names:
        return next(file for folder in _folders(kind, home) if (file := folder / f"{stem}.yaml").is_file())
    place = at or Where("")
    hint = nearest(stem, names) or (f"shipped: {', '.join(names)}" if len(names) <= 12 else "see: ftlaunch presets list")
    if "/" in stem or name.endswith((".yaml", ".yml")):
        message = f"no such file, and no shipped {kind.noun} of that name: {shown(name)}"
    else:
        message = f"no {kind.noun} of the name {shown(name)}"
    raise UsageError(message, code=f"unknown-{kind.noun}", file=place.file or None, line=place.line, key=key, hint=hint)


def _folders(kind: _Kind[T], home: Path | None) -> list[Path]:
    root, _, rest = kind.folder.partition("/")
    own = [user_folder(home) / (rest or root)] if home is not None and kind is not _PRESET else []
    return [*own, shipped(root) / rest]


def _names(kind: _Kind[T], home: Path | None) -> list[str]:
    return sorted({file.stem for folder in _folders(kind, home) for file in folder.glob("*.yaml")})


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(
                f"larger than {MAX_BYTES // 1_000_000} MB: this is no file that a person wrote", code="too-large", file=str(file)
            )
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"not UTF-8: byte 0x{error.object[error.start]:02x}", code="not-utf-8", file=str(file), line=line) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="unreadable", file=str(file)) from None


def _setting(text: str, findings: list[Finding]) -> Node | None:
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
        findings.append(Finding("error", "set-syntax", f"{shown(text)} is not KEY=VALUE", SET, hint="training.learning_rate=1e-5"))
        return None
    before = len(findings)
    node = parse(value, SET, findings)
    for number, finding in enumerate(findings[before:], before):
        findings[number] = replace(finding, line=None, key=key)
    if len(findings) > before:
        return None
    return single(tuple(key.split(".")), Node(None, Where(SET)) if node is None else _moved(node, Where(SET)))


def _moved(node: Node, where: Where) -> Node:
    if isinstance(node.value, dict):
        return Node({name: _moved(child, where) for name, child in node.value.items()}, where)
    if isinstance(node.value, list):
        return Node([_moved(child, where) for child in node.value], where)
    return Node(node.value, where)


def _node(value: object, where: Where) -> Node:
    assert isinstance(value, (str, int, float, bool)), f"an option holds {type(value).__name__}"
    return Node(value, where)


def _at(code: str, message: str, node: Node, key: str) -> Finding:
    return Finding("error", code, message, node.where.file, node.where.line, key)


def _with_absolute_paths(tree: Node, findings: list[Finding]) -> Node:
    """Local paths count from the file that says them, or from the working folder where the command line says them."""
    for mapping, name in (("model", "path"), ("data", "path"), ("stack", "image")):
        entry = tree.value.get(mapping) if isinstance(tree.value, dict) else None
        node = entry.value.get(name) if entry is not None and isinstance(entry.value, dict) else None
        if node is None or not isinstance(node.value, str) or (mapping == "data" and node.value == "stdlib") or "\0" in node.value:
            continue
        folder = Path.cwd() if node.where.file in (SET, COMMAND_LINE) else Path(node.where.file).resolve().parent
        path = folder / Path(node.value).expanduser()
        if not path.exists():
            finding = _at("missing-file", f"{shown(node.value)} does not exist", node, f"{mapping}.{name}")
            findings.append(replace(finding, hint="relative paths count from the file that says them"))
        tree = put(tree, (mapping, name), Node(str(path), node.where))
    return tree
