"""Typed reading of one row: a value of the right type, or an error that says
which field of which line held what.

Knows nothing of question schemas. Fields count as absent where they are null.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stepsearch_jax import files, types

_TEXT_FIELDS = ("paragraph_text", "text", "content")


class Row:
  """The fields of one row, and which of them were asked for.

  Attributes:
    where: "file:line", the beginning of every error.
    used: names of the fields that were read and not null.
  """

  def __init__(self, where: str, values: Mapping[str, Any], prefix: str = ""):
    """Wraps a row, or the object in its field `prefix`."""
    self.where = where
    self.used: set[str] = set()
    self._values = values
    self._prefix = prefix

  def names(self) -> list[str]:
    """Returns the fields that are not null, sorted."""
    return sorted(
      str(k) for k, value in self._values.items() if not missing(value)
    )

  def __contains__(self, name: str) -> bool:
    """Returns whether a field is there and not null; does not count as use."""
    return not missing(self._values.get(name))

  def __getitem__(self, name: str) -> Any:
    """Returns a field as it is, None where absent."""
    value = self._values.get(name)
    if missing(value):
      return None
    self.used.add(name)
    return value

  def first(self, *names: str) -> str | None:
    """Returns the first of `names` that is not null."""
    return next((name for name in names if name in self), None)

  def spelled(self, *names: str) -> str:
    """Returns the first of `names` that stands in the row, null or not."""
    return next((name for name in names if name in self._values), names[0])

  def error(self, name: str, expected: str, given: Any) -> files.DataError:
    """Returns the error for a field, to be raised."""
    shown = repr(given)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return files.DataError(
      f"{self.where}: field {self._prefix}{name} must hold {expected}, got "
      f"{shown}"
    )

  def part(self, name: str) -> Row:
    """Returns the object in a field, without fields where that is absent."""
    value = parsed(self[name])
    if value is not None and not isinstance(value, Mapping):
      raise self.error(name, "an object", value)
    return Row(self.where, value or {}, f"{self._prefix}{name}.")

  def text(self, name: str) -> str | None:
    """Returns a field that holds text; None where absent."""
    value = self[name]
    if value is not None and not isinstance(value, str):
      raise self.error(name, "text", value)
    return value

  def label(self, name: str) -> str | None:
    """Returns text or a whole number as text; None where absent or blank."""
    value = self[name]
    if value is None:
      return None
    return label(value, self, name).strip() or None

  def number(self, name: str) -> int | None:
    """Returns a whole number, also one that pandas made a float of."""
    value = self[name]
    if value is None or isinstance(value, int) and not isinstance(value, bool):
      return value
    if isinstance(value, float) and value.is_integer():
      return int(value)
    if isinstance(value, str) and value.strip().isdecimal():
      return int(value)
    raise self.error(name, "a whole number", value)

  def flag(self, name: str) -> bool | None:
    """Returns true or false, also as 1, 0 or text; None where absent."""
    value = self[name]
    if value is None:
      return None
    known = {"true": True, "1": True, "1.0": True,
             "false": False, "0": False, "0.0": False}
    if str(value).strip().lower() in known:
      return known[str(value).strip().lower()]
    raise self.error(name, "true or false", value)

  def texts(self, name: str, plain: bool = False) -> tuple[str, ...]:
    """Returns a string, number or list of these as distinct texts.

    Blank ones are left out. JSON text of a list counts as the list; if `plain`
    says that the field holds one text, only a list of texts does.
    """
    value = parsed(self[name])
    if plain and isinstance(self[name], str) and not (
      isinstance(value, list) and value
      and all(isinstance(item, str) for item in value)
    ):
      value = self[name]
    if value is None:
      return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, Mapping) or any(
      isinstance(v, (list, tuple, Mapping)) for v in values
    ):
      raise self.error(name, "strings", value)
    found = dict.fromkeys(label(v, self, name) for v in values)
    return tuple(v for v in found if v.strip())

  def groups(self, name: str) -> tuple[tuple[str, ...], ...]:
    """Returns lists of texts; a string stands for a list of one.

    A single string is one group, a flat list one group per string. Numbers are
    refused: a search phrase is text.
    """
    value = parsed(self[name])
    if value is None:
      return ()
    groups = [value] if isinstance(value, str) else value
    if not isinstance(groups, (list, tuple)):
      raise self.error(name, "lists of search phrases", value)
    found = []
    for group in groups:
      group = [group] if isinstance(group, str) else group
      if not isinstance(group, (list, tuple)) or not all(
        isinstance(phrase, str) for phrase in group
      ):
        raise self.error(name, "lists of search phrases", value)
      found.append(tuple(phrase for phrase in group if phrase.strip()))
    return tuple(found)

  def rows(self, name: str) -> list[Row]:
    """Returns a list of objects, also where it is one object of columns."""
    return [
      Row(self.where, item, f"{self._prefix}{name}.")
      for item in self.items(name)
      if isinstance(item, Mapping) or self._refuse(name, item)
    ]

  def passages(self, name: str, ids: bool = False) -> list[types.Passage]:
    """Returns paragraphs: texts, or objects of a title and a text.

    Args:
      name: the field.
      ids: whether their ids are those of a corpus; often they only count the
        paragraphs of one question.
    """
    found = []
    for item in self.items(name):
      if isinstance(item, str):
        found.append(types.Passage.of("", item))
      elif isinstance(item, Mapping):
        part = Row(self.where, item, f"{self._prefix}{name}.")
        found.append(passage(part, ids))
      else:
        self._refuse(name, item)
    return found

  def items(self, name: str) -> Sequence[Any]:
    """Returns a list as it is, one object of columns as a list of objects."""
    value = parsed(self[name])
    if value is None:
      return ()
    if isinstance(value, Mapping):
      table = columns(value)
      return self._refuse(name, value) if table is None else table
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
      self._refuse(name, value)
    return value

  def _refuse(self, name: str, value: Any):
    raise self.error(name, "a list of objects", value)


def passage(row: Row, ids: bool = False) -> types.Passage:
  """Returns the passage that a row of a title and a text holds.

  Raises:
    files.DataError: it has no text.
  """
  title, name = row.text("title"), row.first(*_TEXT_FIELDS)
  if name is None and "contents" in row:
    title, _, text = row.text("contents").partition("\n")
  elif name is None:
    raise row.error(row.spelled(*_TEXT_FIELDS), "text", None)
  else:
    text = row.text(name)
  identity = row.label("id") if ids else None
  if identity is None:
    return types.Passage.of(title or "", text)
  return types.Passage(identity, title or "", text)


def missing(value: Any) -> bool:
  """Returns whether a value is null, as JSON or as pandas writes it."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def label(value: Any, row: Row, name: str) -> str:
  """Returns text, or a number as text; 1998.0 is 1998.

  Raises:
    files.DataError: it is something else.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    if math.isfinite(value):
      return str(int(value)) if value == int(value) else repr(value)
  raise row.error(name, "strings", value)


def parsed(value: Any) -> Any:
  """Returns a list or object that stands in a field as its JSON text."""
  if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
    return value
  for parse in (json.loads, ast.literal_eval):  # The latter as str() writes.
    try:
      found = parse(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue
    return found if isinstance(found, (list, tuple, dict)) else value
  return value


def columns(table: Mapping[str, Any]) -> list[dict[str, Any]] | None:
  """Returns the rows of an object of equally long lists, None if it is none."""
  values = list(table.values())
  if not values or not all(isinstance(v, (list, tuple)) for v in values):
    return None
  if len({len(v) for v in values}) != 1:
    return None
  return [
    dict(zip(table, row, strict=True)) for row in zip(*values, strict=True)
  ]
