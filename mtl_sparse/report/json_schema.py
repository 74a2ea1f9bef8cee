"""JSON Schemas of the files of runs and sweeps, generated from the dataclasses in `schema`.

    python -m mtl_sparse.report.json_schema FOLDER

writes results.json, benchmark.json, latency.json, sweep.json, lomt.json and compact.json.
"""

import dataclasses
import pathlib
import re
import sys
import types
import typing
from typing import Any

from mtl_sparse.report import schema
from mtl_sparse.runtime import files

KINDS: tuple[type[schema.Schema], ...] = (
    schema.Results,
    schema.Timing,
    schema.Latency,
    schema.Sweep,
    schema.Choices,
    schema.CompactLayer,
)
_SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number"}


def of(cls: type[schema.Schema]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the newest version of a kind of file.

    compact.json is a list of `CompactLayer`, and so is its schema.
    """
    definitions: dict[str, Any] = {}
    reference = _type(cls, definitions)
    top = definitions.pop(cls.__name__)
    if cls is schema.CompactLayer:
        definitions[cls.__name__], top = top, {"type": "array", "items": reference}
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{cls.kind}.json", **top}
    return found | ({"$defs": definitions} if definitions else {})


def write(folder: pathlib.Path) -> None:
    """Write a file for each kind, <kind>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for cls in KINDS:
        files.write_json(folder / f"{cls.kind}.json", of(cls))


def _type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type of `schema`, and add the objects that it refers to to the definitions."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None: None is not written
        return _type(arguments[0], definitions)
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1], definitions)}
    if isinstance(hint, type) and issubclass(hint, schema.Schema):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # before its fields, which may refer to it
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {} if hint is Any else {"type": _SCALARS[hint]}


def _object(cls: type[schema.Schema], definitions: dict[str, Any]) -> dict[str, Any]:
    texts, hints = _attributes(cls), typing.get_type_hints(cls)
    properties: dict[str, Any] = {"version": {"type": "integer", "const": schema.VERSION}} if cls.kind else {}
    required = list(properties)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        key, hint = field.name.rstrip("_"), hints[field.name]
        described = {"description": texts[field.name]} if field.name in texts else {}
        properties[key] = _type(hint, definitions) | described
        if typing.get_origin(hint) is not types.UnionType:
            required.append(key)
    summary = (cls.__doc__ or "").partition("\n")[0]
    return {"description": summary, "type": "object", "properties": properties, "required": required}


def _attributes(cls: type) -> dict[str, str]:
    """Return {field: text} of the Attributes of a docstring in Google form."""
    _, _, section = (cls.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"(?ms)^ {6}(\w+): (.*?)(?=^ {6}\w+: |\Z)", section)
    return {name: " ".join(text.split()) for name, text in found}


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
