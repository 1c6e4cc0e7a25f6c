"""`settings_of(words, schema)`: key=value words of a command line as the fields of a dataclass."""

from collections.abc import Callable
from dataclasses import fields

from lance_quant.errors import LanceQuantError


def settings_of(arguments: list[str], schema: Callable) -> dict:
    """Raises LanceQuantError for a word that is no field of the schema, or no value of its type."""
    known = {field.name: field.type for field in fields(schema)}
    found = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise LanceQuantError(f"'{word}' is no setting: take key=value of {', '.join(known)}")
        try:
            found[key] = known[key](value)
        except ValueError as error:
            raise LanceQuantError(f"{key}={value} is not of type {known[key].__name__}") from error
    return found
