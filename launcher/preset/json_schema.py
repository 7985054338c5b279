"""The schemas as JSON schema (draft 7, which editors read), made from the field types and their docstrings.

It is never stricter than the reader: any key may be null, and keys are only required where nothing is extended. It does not know what
spans several keys, such as exactly one source of a model.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import BaseModel

from launcher.preset.config import UserConfig
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack

Json: TypeAlias = dict[str, Any]

SCHEMAS: dict[str, type[BaseModel]] = {
    "preset": Preset,
    "site": Site,
    "hardware": Hardware,
    "stack": Stack,
    "model": ModelFacts,
    "config": UserConfig,
}

FILE = "preset.schema.json"
"""In ``presets/``, beside the presets whose first line names it: what ``ftlaunch schema`` prints."""

COMMENT = "# yaml-language-server: $schema="
"""How a file tells editors its schema: by an address, or by a path from the file."""

_DRAFT = "http://json-schema.org/draft-07/schema#"
_REF = "#/definitions/"


def json_schema(noun: str) -> Json:
    """The schema of a file that says a preset, site, hardware, stack, model facts or the user's configuration."""
    raw = SCHEMAS[noun].model_json_schema(ref_template=f"{_REF}{{model}}")
    definitions = raw.pop("$defs", {})
    complete = _complete(raw, definitions) or {}
    extends = {
        "type": "string",
        "minLength": 1,
        "description": "A file beside this one, or a name: what is not said here is taken from it.",
    }
    top = _partial(raw)
    return {
        "$schema": _DRAFT,
        "title": f"ftlaunch {noun}",
        **top,
        "properties": {"extends": extends, **top["properties"]},
        "if": {"required": ["extends"]},
        "else": complete,
        "definitions": {name: {**_partial(definition), "type": ["object", "null"]} for name, definition in definitions.items()},
    }


def _partial(schema: Json) -> Json:
    """The schema of a mapping that may be laid over another one: nothing is required, and null takes a key away."""
    kept = {name: value for name, value in schema.items() if name not in ("required", "title", "discriminator")}
    if "properties" in kept:
        kept["properties"] = {name: _nullable(_untitled(value)) for name, value in kept["properties"].items()}
    return kept


def _untitled(schema: Any) -> Any:
    """Without the titles that repeat the key, and without ``null`` as a default, which only says that there is none."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = {"title", "discriminator"} | ({"default"} if schema.get("default", 0) is None else set())
    # A mapping that only says what it changes may be of several kinds.
    return {"anyOf" if name == "oneOf" else name: _untitled(value) for name, value in schema.items() if name not in dropped}


def _nullable(schema: Json) -> Json:
    """Also null, without a choice where one can do without: validators say little about why no choice fits."""
    if "$ref" in schema:
        rest = {name: value for name, value in schema.items() if name != "$ref"}
        return {**rest, "allOf": [{"$ref": schema["$ref"]}]}  # draft 7 ignores what stands beside a reference; definitions are nullable
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
        rest = {name: value for name, value in schema.items() if name != "anyOf"}
        return {**rest, **(_nullable(choices[0]) if len(choices) == 1 else {"anyOf": [*choices, {"type": "null"}]})}
    schema = {**schema, "type": [schema["type"], "null"]}
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    return {**schema, "enum": [*schema["enum"], None]} if "enum" in schema else schema


def _complete(schema: Json, definitions: Json) -> Json | None:
    """What else holds where nothing is extended: the keys that must be there; None where there are none."""
    if "$ref" in schema:
        return _complete(definitions[schema["$ref"].removeprefix(_REF)], definitions)
    if "oneOf" in schema:
        return {"oneOf": [_branch(definitions[branch["$ref"].removeprefix(_REF)]) for branch in schema["oneOf"]]}
    for branch in schema.get("anyOf", ()):
        if found := _complete(branch, definitions):
            return found
    required = schema.get("required", [])
    inner = {name: _complete(value, definitions) or {} for name, value in schema.get("properties", {}).items()}
    inner = {name: {**value, **({"not": {"type": "null"}} if name in required else {})} for name, value in inner.items()}
    inner = {name: value for name, value in inner.items() if value}
    return {"required": required, "properties": inner} if required or inner else None


def _branch(definition: Json) -> Json:
    """One kind of several: the keys that it must have."""
    return {"required": definition["required"], "properties": {"kind": _untitled(definition["properties"]["kind"])}}
