"""The strict YAML loader: a file, a text or a mapping becomes a dataclass instance, or one error.

Every problem of a file is collected and raised in one :class:`~monteclora.errors.ConfigError`, each with the
file, the line and the nearest right name.

A schema is a dataclass, frozen or plain, whose fields are annotated with ``int``, ``float``, ``str``,
``bool``, ``Any``, ``Literal``, ``list[X]``, ``tuple[X, ...]``, ``dict[str, X]``, other dataclasses, and
unions of these. It may define ``problems(self) -> list[tuple[str, str]]``: pairs of field name and message
for values that have the right type and are wrong all the same.
"""

from monteclora.config.document import Document, Node, brief, load_yaml, nearest, parse_yaml
from monteclora.config.schema import build, default_of, dump

__all__ = ["Document", "Node", "brief", "build", "default_of", "dump", "load_yaml", "nearest", "parse_yaml"]
