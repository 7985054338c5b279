"""Commands that print facts and do nothing: presets, schema; and what ``check --explain`` says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import options
from launcher.cli.show import out, show_json, show_plan, show_rows, show_text

if TYPE_CHECKING:  # a start must not load pydantic
    from launcher.cli.line import Line
    from launcher.plan import Plan


def presets(
    action: Annotated[str, typer.Argument(metavar="[list|show]")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    as_json: options.Json = False,
) -> None:
    """What there is, in ./presets, in ~/.config/ftlaunch/presets and shipped: list, or show NAME."""
    from launcher.errors import UsageError

    if action == "show" and name is not None:
        _show_preset(name, as_json=as_json)
    elif action == "list" and name is None:
        _list_presets(as_json=as_json)
    else:
        raise UsageError("presets takes 'list' or 'show NAME'", code="usage", hint="ftlaunch presets show tiny")


def schema(
    noun: Annotated[str, typer.Argument(metavar="[preset|site|hardware|stack|model|config]")] = "preset",
    as_json: options.Json = False,
) -> None:
    """A JSON schema that editors check a file with. JSON with and without --json."""
    from launcher.errors import UsageError
    from launcher.preset.complaints import nearest, shown
    from launcher.preset.json_schema import SCHEMAS, json_schema

    if noun not in SCHEMAS:
        hint = nearest(noun, SCHEMAS) or ", ".join(SCHEMAS)
        raise UsageError(f"there is no schema of the name {shown(noun)}", code="unknown-schema", hint=hint)
    show_json(json_schema(noun))


def explained(line: Line, plan: Plan, keys: Sequence[str], *, as_json: bool) -> list[dict[str, Any]]:
    """What ``check --explain`` says of each key, also on the screen unless as JSON. Errors: UsageError."""
    from launcher.preset.choose import Chosen
    from launcher.preset.explain import explain
    from launcher.preset.fields import duration_text

    layout = plan.layout
    planned = {
        "attention": plan.attention,
        "training.micro_batch": plan.batch.micro_batch,
        "ranks_per_node": layout.ranks_per_node,
        "cpus_per_node": layout.cpus_per_node,
        "memory_per_node_gib": layout.memory_per_node_gib,
        "threads_per_rank": layout.threads_per_rank,
        "slurm.time": None if plan.time_limit_min is None else duration_text(plan.time_limit_min),
    }
    chosen = {f"slurm.{key}": value for key, value in line.slurm.items()}
    chosen["site"] = Chosen(line.site.value.name, line.site_source)
    found = [explain(key, line.preset, chosen=chosen, planned=planned) for key in keys]
    if not as_json:
        for one in found:
            out().print(one.key, style="bold", markup=False)
            out().print(one.meaning, markup=False)
            rows: list[tuple[str, object]] = [("may be", one.type), ("unit", one.unit), ("default", one.default)]
            rows += [("value", "none" if one.value is None else _text(one.value)), ("from", one.source)]
            if len(one.said) > 1:
                rows += [(said.source, _text(said.value)) for said in one.said]
            show_plan({name: value for name, value in rows if value is not None})
    return [dataclasses.asdict(one) for one in found]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show_preset(name: str, *, as_json: bool) -> None:
    from launcher.preset.json_schema import COMMENT, FILE
    from launcher.preset.reading import read_preset
    from launcher.shipped import shipped

    loaded = read_preset(name)
    if as_json:
        show_json({"ok": True, "file": str(loaded.file), "preset": loaded.value.model_dump(mode="json")})
    else:  # a copy lies elsewhere, and its editor must find the schema from there
        show_text(loaded.text.replace(f"{COMMENT}{FILE}\n", f"{COMMENT}{shipped('presets') / FILE}\n", 1))


def _list_presets(*, as_json: bool) -> None:
    from launcher.errors import UsageError
    from launcher.preset.reading import known_presets, read_preset

    taken: dict[str, str] = {}
    documents: list[dict[str, Any]] = []
    for found in known_presets():
        document = {"name": found.name, "source": found.source, "file": str(found.file), "shadowed_by": taken.get(found.name)}
        taken.setdefault(found.name, str(found.file))
        try:
            preset = read_preset(str(found.file)).value
            hardware = f"{preset.nodes} × {preset.gpus} {preset.hardware}"
            document |= {"hardware": hardware, "stack": preset.model_dump(mode="json")["stack"], "description": preset.description}
        except UsageError as error:
            document |= {"hardware": None, "stack": None, "description": None, "wrong": str(error.findings[0])}
        documents.append(document)
    if as_json:
        show_json({"ok": True, "presets": documents})
        return
    show_rows(("preset", "from", "nodes × GPUs", "stack", ""), [_row(document) for document in documents])


def _row(document: dict[str, Any]) -> tuple[object, ...]:
    words = document["description"]
    if "wrong" in document:
        words = f"cannot be read: {document['wrong']}"
    elif document["shadowed_by"] is not None:
        words = f"shadowed by {document['shadowed_by']}"
    stack = document["stack"]
    return document["name"], document["source"], document["hardware"], stack["image"] if isinstance(stack, dict) else stack, words
