"""The API's description, OpenAPI 3.1: operations from the framework, the schemas of bodies from msgspec.

So the description says of a body exactly what is accepted: types, defaults, unknown keys. Knows no resource.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from litestar.openapi.spec import Reference, Schema
from litestar.plugins import OpenAPISchemaPlugin

if TYPE_CHECKING:
    from litestar import Litestar
    from litestar.typing import FieldDefinition

_REFERENCE = "#/components/schemas/{name}"


class Bodies(OpenAPISchemaPlugin):
    """Answers the framework's question for the schema of a struct with a reference, and remembers the struct."""

    def __init__(self) -> None:
        self._types: list[Any] = []

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        """Structs, also generic ones."""
        origin = getattr(field_definition.annotation, "__origin__", field_definition.annotation)
        return isinstance(origin, type) and issubclass(origin, msgspec.Struct)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Any:
        """The reference to it."""
        self._types.append(field_definition.annotation)
        (found,), _ = _components([field_definition.annotation])
        return Schema(all_of=[Reference(ref=found["$ref"])])

    def describe(self, app: Litestar) -> dict[str, Any]:
        """The whole description."""
        described: dict[str, Any] = app.openapi_schema.to_schema()
        _, components = _components(self._types)
        described["components"].setdefault("schemas", {}).update(components)
        return described


def _components(types: list[Any]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    return msgspec.json.schema_components(types, schema_hook=_anything, ref_template=_REFERENCE)


def _anything(type: Any) -> dict[str, Any]:
    """The schema of ``object``: any JSON."""
    if type is object:
        return {"description": "any JSON"}
    raise NotImplementedError(f"{type} has no JSON schema")
