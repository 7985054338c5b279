"""Files that users write → validated values, each with the place where it was written. Where the files lie: ``launcher.preset.search``.
What follows from the values is the planner's business.

A value comes, last one wins, from the file that ``extends`` names, the file itself, ``--set``, the options of the command line.
Mappings are laid over each other entry by entry, lists and values replace; null takes a key away, so that its default holds. Of
exclusive choices (model name, path, config; data name, path; adapter; stack; base) the last one made replaces the others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from launcher.errors import Finding, UsageError
from launcher.plan import BIND
from launcher.preset.complaints import complaints, shown
from launcher.preset.config import UserConfig
from launcher.preset.hardware import Hardware
from launcher.preset.local import with_absolute_paths
from launcher.preset.model import ModelFacts, facts_of_config
from launcher.preset.schema import Preset
from launcher.preset.search import Found, Kind, find, find_base, is_file, known, text_of, user_folder
from launcher.preset.secrets import redacted, secrets
from launcher.preset.site import Site
from launcher.preset.stack import Stack
from launcher.preset.tree import Node, Where, merge, parse, places, plain, single, without_nulls
from launcher.preset.variables import with_variables

T = TypeVar("T", bound=BaseModel)

MAX_EXTENDS = 8

COMMAND_LINE = "command line"
SET = "--set"

PROJECT = Path("presets")
"""The folder of the working folder that may hold presets."""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What was read, and where each value of it was written."""

    value: T
    text: str
    """The file, verbatim."""
    file: Path
    provenance: Mapping[str, Where]
    """Dotted key → file, line and column. Defaults are not in it."""
    layers: tuple[Node, ...] = ()
    """What each file and each option said, the last one wins."""

    def where(self, key: str) -> Where:
        """Where ``key`` was written, else the nearest mapping around it, else the file."""
        while key:
            if key in self.provenance:
                return self.provenance[key]
            key = key.rpartition(".")[0]
        return Where(str(self.file))


_PRESET = Kind("preset", Preset, "presets")
_SITE = Kind("site", Site, "presets/sites")
_HARDWARE = Kind("hardware", Hardware, "presets/hardware")
_STACK = Kind("stack", Stack, "containers")
_MODEL = Kind("model", ModelFacts, "presets/models")
_CONFIG = Kind("configuration", UserConfig, "")


def read_preset(
    name: str, *, settings: Sequence[str] = (), options: Mapping[str, object] | None = None, home: Path | None = None
) -> Loaded[Preset]:
    """A preset by path, else by name, else by the path of a shipped one (``presets/starcoder2-15b.yaml``).

    ``settings``: ``key.of.it=VALUE``, the value read as YAML 1.2. ``options``: dotted key → value from the command line's own
    options, None where it was not given. Relative paths in it count from the file that says them.
    Errors: UsageError with everything that is wrong.
    """
    home = home or Path.home()
    findings: list[Finding] = []
    layers = [_setting(text, findings) for text in settings]
    for key, value in (options or {}).items():
        if value is not None:
            layers.append(single(tuple(key.split(".")), _node(value, Where(COMMAND_LINE))))
    file = find(_PRESET, name, home, project=PROJECT)
    return _read(_PRESET, file, home, [layer for layer in layers if layer is not None], findings)


def read_site(name: str, *, home: Path | None = None, at: Where | None = None, environ: Mapping[str, str] | None = None) -> Loaded[Site]:
    """By path, else by name. ``at``: where it was named, for the message.

    Variables in binds and in the container's environment are replaced from ``environ``, by default this process's.
    """
    return _with_variables(_read_named(_SITE, name, home, at), os.environ if environ is None else environ)


def read_hardware(name: str, *, home: Path | None = None, at: Where | None = None) -> Loaded[Hardware]:
    """By path, else by name."""
    return _read_named(_HARDWARE, name, home, at)


def read_stack(name: str, *, home: Path | None = None, at: Where | None = None) -> Loaded[Stack]:
    """By path, else by name; its lock lies beside the file."""
    return _read_named(_STACK, name, home, at)


def read_model_facts(name: str, *, home: Path | None = None) -> Loaded[ModelFacts]:
    """By path, else by file name."""
    return _read_named(_MODEL, name, home, None)


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
    if stem not in [found.name for found in known(_MODEL, home or Path.home())]:
        return None
    facts = read_model_facts(stem, home=home).value
    return facts if facts.name == preset.model.name else None


def read_config(*, home: Path | None = None) -> Loaded[UserConfig] | None:
    """``~/.config/ftlaunch/config.yaml``; None when there is none."""
    path = user_folder(home or Path.home()) / "config.yaml"
    return _read(_CONFIG, path, home or Path.home()) if is_file(path) else None


def shipped_presets() -> list[str]:
    """Names of the shipped presets."""
    return [found.name for found in known(_PRESET, None)]


def known_presets(*, home: Path | None = None) -> list[Found]:
    """Those of the working folder and of the user, and the shipped ones; of one name the one that is taken first."""
    return known(_PRESET, home or Path.home(), PROJECT)


def known_hardware(*, home: Path | None = None) -> list[str]:
    """Names of the user's hardware files and of the shipped ones."""
    return list(dict.fromkeys(found.name for found in known(_HARDWARE, home or Path.home())))


def known_stacks(*, home: Path | None = None) -> list[str]:
    """Names of the user's stacks and of the shipped ones."""
    return [found.name for found in known(_STACK, home or Path.home())]


def locate(findings: Sequence[Finding], preset: Loaded[Preset]) -> list[Finding]:
    """Findings of the planner, with the place in the preset where their key was written."""
    located = []
    for finding in findings:
        if finding.file is None and finding.key is not None:
            where = preset.where(finding.key)
            finding = replace(finding, file=where.file, line=where.line, column=where.column)
        located.append(finding)
    return located


def _read_named(kind: Kind[T], name: str, home: Path | None, at: Where | None) -> Loaded[T]:
    home = home or Path.home()
    return _read(kind, find(kind, name, home, at), home)


def _read(kind: Kind[T], file: Path, home: Path, over: Sequence[Node] = (), findings: list[Finding] | None = None) -> Loaded[T]:
    findings = [] if findings is None else findings
    text = text_of(file)
    layers, whole = _layers(kind, file, text, [], findings, home)
    if not layers:
        raise _refused(findings, file)
    layers, whole = [*layers, *over], whole and not findings
    for layer in layers:
        findings += _secrets(layer)
    tree = without_nulls(reduce(merge, layers))
    if kind.schema is Preset:
        tree = with_absolute_paths(tree, Path.cwd(), findings)
    try:
        value = kind.schema.model_validate(plain(tree), strict=True)
    except ValidationError as error:
        said = {finding.key for finding in findings}
        findings += [finding for finding in complaints(error, tree, kind.schema, whole=whole) if finding.key not in said]
    if findings:
        raise _refused([*findings, *_unknown_names(kind, tree, home, findings)], file)
    return Loaded(value, text, file, places(tree), tuple(layers))


def _refused(findings: Sequence[Finding], file: Path) -> UsageError:
    """By place, those of the file itself first; without secrets."""

    def clean(text: str | None) -> str | None:
        return None if text is None else redacted(text)

    def place(finding: Finding) -> tuple[bool, str, int, int]:
        return finding.file != str(file), finding.file or "", finding.line or 0, finding.column or 0

    return UsageError(
        findings=[
            replace(finding, message=redacted(finding.message), key=clean(finding.key), hint=clean(finding.hint))
            for finding in sorted(dict.fromkeys(findings), key=place)
        ]
    )


def _unknown_names(kind: Kind[T], tree: Node, home: Path, findings: Sequence[Finding]) -> Iterator[Finding]:
    """Names in a refused preset that nothing has, since nobody will come to read what they name."""
    said = {finding.key for finding in findings}
    named: tuple[Kind[Any], ...] = (_HARDWARE, _STACK, _SITE)
    entries = tree.value if kind.schema is Preset and isinstance(tree.value, dict) else {}
    for one in named:
        entry = entries.get(one.noun)
        if entry is not None and isinstance(entry.value, str) and one.noun not in said:
            try:
                find(one, entry.value, home, entry.where)
            except UsageError as error:
                yield from error.findings


def _secrets(layer: Node) -> list[Finding]:
    message = "looks like a token or a password: a preset is copied into every run"
    hint = "leave it out; set HF_TOKEN where ftlaunch stage runs, or log in with the hub's own command"
    return [
        _at("secret", message, node, ".".join(key), hint)
        for key, node in secrets(layer)
        if key[0] != "mirrors"  # a site's package index may need a password, and mirrors are left out of plans
    ]


def _with_variables(loaded: Loaded[Site], environ: Mapping[str, str]) -> Loaded[Site]:
    """Errors: UsageError for each variable that is not set, or that makes no bind."""
    findings: list[Finding] = []

    def filled(text: str, key: str, *, bind: bool) -> str:
        where = loaded.where(key)
        try:
            full = with_variables(text, environ, bind=bind)
        except LookupError as error:
            findings.append(_told("no-variable", f"{text}: ${error.args[0]} is not set", where, key))
            return text
        if bind and not BIND.fullmatch(full):
            findings.append(_told("bind", f"{text}: {full} has a path that is not absolute", where, key))
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


def _layers(kind: Kind[T], file: Path, text: str, below: list[Path], findings: list[Finding], home: Path) -> tuple[list[Node], bool]:
    """The trees of what ``file`` extends, lowest first, then its own; and whether they are all. ``below``: the files that led here."""
    tree = parse(text, str(file), findings)
    if tree is None or not isinstance(tree.value, dict):
        if not any(finding.file == str(file) for finding in findings):
            what = "empty" if tree is None or tree.value is None else f"{shown(tree.value)} at its root"
            findings.append(_told("not-a-mapping", f"{what}: a {kind.noun} is a mapping of keys and values", Where(str(file), 1, 1), None))
        return [], False
    if "extends" not in tree.value:
        return [tree], True
    entry = tree.value["extends"]
    own = [Node({name: node for name, node in tree.value.items() if name != "extends"}, tree.where)]
    if not isinstance(entry.value, str):
        message = f"a file or the name of a shipped {kind.noun} is needed, not {shown(entry.value)}"
        findings.append(_at("wrong-type", message, entry, "extends"))
        return own, False
    chain = [*below, file]
    try:
        base = find_base(kind, entry.value, file, home, entry.where)
        if base.resolve() in [path.resolve() for path in chain]:
            circle = " → ".join(path.name for path in [*chain, base])
            findings.append(_at("extends-cycle", f"goes in a circle: {circle}", entry, "extends"))
            return own, False
        if len(chain) > MAX_EXTENDS:
            findings.append(_at("extends-depth", f"more than {MAX_EXTENDS} files deep", entry, "extends"))
            return own, False
        lower, whole = _layers(kind, base, text_of(base), chain, findings, home)
    except UsageError as error:
        findings.extend(error.findings)
        return own, False
    return [*lower, *own], whole


def _setting(text: str, findings: list[Finding]) -> Node | None:
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
        findings.append(Finding("error", "set-syntax", f"{shown(text)} is not KEY=VALUE", SET, hint="training.learning_rate=1e-5"))
        return None
    before = len(findings)
    node = parse(value, SET, findings)
    for number, finding in enumerate(findings[before:], before):
        findings[number] = replace(finding, line=None, column=None, key=key)
    if len(findings) > before:
        return None
    return single(tuple(key.split(".")), Node(None, Where(SET)) if node is None else _moved(node, Where(SET)))


def _moved(node: Node, where: Where) -> Node:
    if isinstance(node.value, dict):
        return Node({name: _moved(child, where) for name, child in node.value.items()}, where)
    if isinstance(node.value, list):
        return Node([_moved(child, where) for child in node.value], where)
    return Node(node.value, where, node.raw)


def _node(value: object, where: Where) -> Node:
    assert isinstance(value, (str, int, float, bool)), f"an option holds {type(value).__name__}"
    return Node(value, where)


def _at(code: str, message: str, node: Node, key: str, hint: str | None = None) -> Finding:
    return _told(code, message, node.where, key, hint)


def _told(code: str, message: str, where: Where, key: str | None, hint: str | None = None) -> Finding:
    return Finding("error", code, message, where.file, where.line, key, hint, where.column)
