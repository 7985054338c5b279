"""The paths in a preset: absolute, there, and not for everybody to change. What they must hold is the stage's and the image's business."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import Finding
from launcher.preset.complaints import shown
from launcher.preset.search import writable_by_all
from launcher.preset.tree import Node, put


def with_absolute_paths(tree: Node, cwd: Path, findings: list[Finding]) -> Node:
    """Local paths count from the file that says them, or from ``cwd`` where the command line says them."""
    sources = _at_key(tree, ("data", "sources"))
    number = len(sources.value) if sources is not None and isinstance(sources.value, list) else 0
    keys = [("model", "path"), ("data", "path"), *(("data", "sources", str(at), "path") for at in range(number)), ("stack", "image")]
    for names in keys:
        node = _at_key(tree, names)
        if node is None or not isinstance(node.value, str) or (names[0] == "data" and node.value == "stdlib"):
            continue
        key = ".".join(names)
        if any(finding.key == key for finding in findings):  # a secret, not to be looked for
            continue
        folder = cwd if node.where.line is None else Path(node.where.file).resolve().parent
        try:
            path = folder / Path(node.value).expanduser()
            path.stat()
            if place := writable_by_all(path):
                hint = f"chmod o-w {place}, or a copy of your own"
                findings.append(_at("writable-by-all", f"everybody can write {place}", node, key, hint))
            tree = put(tree, names, Node(str(path), node.where))
        except (OSError, RuntimeError, ValueError) as error:
            code, message, reason = _why_not(node.value, error)
            findings.append(_at(code, message, node, key, reason))
    return tree


def _at_key(node: Node | None, names: tuple[str, ...]) -> Node | None:
    for name in names:
        if node is None:
            return None
        entries = {str(at): entry for at, entry in enumerate(node.value)} if isinstance(node.value, list) else node.value
        node = entries.get(name) if isinstance(entries, dict) else None
    return node


def _why_not(text: str, error: OSError | RuntimeError | ValueError) -> tuple[str, str, str | None]:
    """Code, message and hint for a path that cannot be used."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        hint = "relative paths count from the file that says them"
        return "missing-file", f"{shown(text)} does not exist", "variables are not replaced: write the path out" if "$" in text else hint
    if isinstance(error, OSError):
        return "unreadable", f"{shown(text)}: {error.strerror}", None
    if isinstance(error, RuntimeError):  # ~nobody
        return "missing-file", f"{shown(text)}: there is no such user here", "write the path out"
    return "wrong-value", f"{shown(text)} is no path", None


def _at(code: str, message: str, node: Node, key: str, hint: str | None) -> Finding:
    return Finding("error", code, message, node.where.file, node.where.line, key, hint, node.where.column)
