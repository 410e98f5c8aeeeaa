#!/usr/bin/env python3
"""Writes the reference of all keys of a recipe, from the recipe's own types: what docs/recipe.md holds.

    python tools/recipe_reference.py docs/recipe.md

A test says that the file in the repository is what this makes.
"""

import inspect
import json
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dmd_ds.checkpoint import write_whole
from dmd_ds.commands import command_parser
from dmd_ds.recipe import REPOSITORY, USED_BY, Recipe

PAGE = REPOSITORY / "docs" / "recipe.md"
HEAD = """# Every key of a recipe

Made by `python tools/recipe_reference.py` from `dmd_ds/recipe.py` and `dmd_ds/stages.py`; do not edit.

A recipe is a YAML file. Defaults are replaced by the file, the file by `key=value` on the command line, where a key of a section is
written `section.key` and the value is read as YAML. An unknown key, a value out of its range and a section that the stage does not
use are refused in one line that names the key.
"""
WORDS = {"integer": "int", "number": "float", "string": "text", "boolean": "true or false", "null": "null"}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "like"}
WIDEST = (-(2**63), 2**63)  # of a seed: all that torch takes


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or may hold."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType] if optional(field) else [field.annotation]
    return next(filter(is_section, kinds), None)


def section_of_each(field: FieldInfo) -> type[BaseModel] | None:
    """The section that is the value of each name of a mapping."""
    return next(filter(is_section, get_args(field.annotation)), None) if get_origin(field.annotation) is dict else None


def optional(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


def is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def described(schema: dict[str, Any]) -> str:
    """The type of a value and the range it is held to, in words, of its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(described(kind) for kind in schema["anyOf"])
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{word}`" for word in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return listed(schema)
    if schema["type"] == "object":
        return f"names, each with {described(schema['additionalProperties'])}"
    limits = [f"{sign} {written(schema[name])}" for name, sign in LIMITS.items() if name in schema and schema[name] not in WIDEST]
    return " ".join([WORDS[schema["type"]], ", ".join(limits)]).strip()


def listed(schema: dict[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"[{'; '.join(described(item) for item in schema['prefixItems'])}]"
    least = f", at least {schema['minItems']}" if schema.get("minItems") else ""
    return f"list of {described(schema['items'])}{least}"


def written(limit: int | float | str) -> str:
    return f"`{limit}`" if isinstance(limit, str) else f"{limit:g}"


def row(name: str, field: FieldInfo, schema: dict[str, Any]) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(schema.get('default'))}`"
    cells = [f"`{name}`", described(schema), default, schema.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(prefix: str, section: type[BaseModel]) -> list[str]:
    """A line a key of a section that is no section itself."""
    properties = section.model_json_schema()["properties"]
    values = {name: field for name, field in section.model_fields.items() if section_of(field) is None}
    rows = [row(prefix + name, field, properties[name]) for name, field in values.items()]
    return ["| key | value | default | what it is |", "|---|---|---|---|", *rows]


def reference() -> str:
    """The whole page."""
    lines = [HEAD, "## The recipe itself", "", *table("", Recipe)]
    for name, field in Recipe.model_fields.items():
        section = section_of(field)
        if section is None:
            continue
        stages = USED_BY.get(name)
        lines += ["", f"## {name}", ""]
        lines += [inspect.cleandoc(section.__doc__), ""] if section.__doc__ and section.__doc__ != BaseModel.__doc__ else []
        lines += [f"Of {'every stage' if stages is None else ' and '.join(f'`stage: {stage}`' for stage in stages)}.", ""]
        lines += table(f"{name}.", section)
        for inner in filter(None, map(section_of_each, section.model_fields.values())):
            lines += ["", f"### {inner.__name__}", "", *table("", inner)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", default=PAGE, help="default: docs/recipe.md")
    out = parser.parse_args().out
    write_whole(out, reference())
    print(out)


if __name__ == "__main__":
    main()
