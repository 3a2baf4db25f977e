"""Typed reading of one row: a value of the right type, or an error that says
which field of which line held what.

Knows nothing of question schemas. Fields count as absent where they are null;
where several could say the same, the first one that is not empty counts.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
import tokenize
from collections.abc import Mapping
from typing import Any, NoReturn

from stepsearch_jax import files, types

# Where a passage's text stands, and its id in a corpus (`_id` is BEIR's).
TEXTS = ("paragraph_text", "text", "content", "contents")
_IDS = ("id", "_id", "pid", "docid")
# Words in lists as Python, pandas and NumPy print them.
_PRINTED = frozenset((
  "None", "True", "False", "nan", "null", "true", "false", "array", "list",
  "dtype", "object",
))
_NO_PRINTED = "a list of texts; this is one as NumPy, Python or JSON prints it"


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

  def filled(self, *names: str) -> str | None:
    """Returns the first of `names` that is neither null nor empty."""
    return next(
      (name for name in names if not empty(self._values.get(name))), None
    )

  def spelled(self, *names: str) -> str | None:
    """Returns the first of `names` that stands in the row, null or not."""
    return next((name for name in names if name in self._values), None)

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
    value = {} if empty(value) else value
    if not isinstance(value, Mapping):
      raise self.error(name, "an object", value)
    return Row(self.where, value, f"{self._prefix}{name}.")

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
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}\s*", value):
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
    if plain and isinstance(self[name], str) and not _only_texts(value):
      value = self[name]
    if not isinstance(value, str) and empty(value):
      return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, Mapping) or any(
      isinstance(v, (list, tuple, Mapping)) for v in values
    ):
      raise self.error(name, "strings", value)
    found = dict.fromkeys(label(self._one(name, v), self, name) for v in values)
    return tuple(v for v in found if v.strip())

  def groups(self, name: str) -> tuple[tuple[str, ...], ...]:
    """Returns lists of texts; a string stands for a list of one.

    A single string is one group, a flat list one group per string, where the
    string is no JSON text of a list. Numbers are refused: a search phrase is
    text.
    """
    value = parsed(self[name])
    if value is None:
      return ()
    groups = [value] if isinstance(value, str) else value
    if not isinstance(groups, (list, tuple)):
      raise self.error(name, "lists of search phrases", value)
    found = []
    for group in groups:
      group = parsed(group) if _only_texts(parsed(group)) else group
      group = [group] if isinstance(group, str) else group
      if not isinstance(group, (list, tuple)) or not all(
        isinstance(phrase, str) for phrase in group
      ):
        raise self.error(name, "lists of search phrases", value)
      found.append(tuple(
        self._one(name, phrase) for phrase in group if phrase.strip()
      ))
    return tuple(found)

  def rows(self, name: str) -> list[Row]:
    """Returns a list of objects, also where it is one object of columns."""
    found = []
    for item in self.items(name):
      if not isinstance(item, Mapping):
        self._refuse(name, item)
      found.append(Row(self.where, item, f"{self._prefix}{name}."))
    return found

  def passages(self, name: str, ids: bool = False) -> list[types.Passage]:
    """Returns paragraphs: texts, or objects of a title and a text.

    Args:
      name: the field.
      ids: whether their ids are those of a corpus; often they only count the
        paragraphs of one question.
    """
    return [self.passage(name, item, ids) for item in self.items(name)]

  def passage(
    self, name: str, item: str | Mapping[str, Any], ids: bool = False
  ) -> types.Passage:
    """Returns the passage that is one of the `items` of a field."""
    if isinstance(item, str):
      return types.Passage.of("", item)
    return passage(Row(self.where, item, f"{self._prefix}{name}."), ids)

  def items(self, name: str) -> list[str | Mapping[str, Any]]:
    """Returns a list of texts and objects, also of objects as JSON text.

    One object of columns counts as a list of objects.
    """
    value = parsed(self[name])
    if value is None:
      return []
    table = columns(value) if isinstance(value, Mapping) else None
    value = value if table is None else table
    if not isinstance(value, (list, tuple)):
      self._refuse(name, value)
    found = []
    for item in value:
      inner = parsed(item)
      if not isinstance(inner, (str, Mapping)):
        self._refuse(name, item)
      found.append(self._one(name, inner))
    return found

  def _one(self, name: str, value: Any) -> Any:
    """Returns a value that is one text if it is any, not that of a list."""
    if isinstance(value, str) and printed_list(value):
      raise self.error(name, _NO_PRINTED, value)
    return value

  def _refuse(self, name: str, value: Any) -> NoReturn:
    raise self.error(name, "a list of objects", value)


def passage(row: Row, ids: bool = False) -> types.Passage:
  """Returns the passage that a row of a title and a text holds.

  Raises:
    files.DataError: it has no text.
  """
  title, name = row.text("title") or "", row.filled(*TEXTS) or row.first(*TEXTS)
  if name is None:
    raise row.error(row.spelled(*TEXTS) or TEXTS[0], "text", None)
  text = row.text(name)
  if name == "contents":
    title, text = split_contents(text, title)
  identity = next(filter(None, map(row.label, _IDS)), None) if ids else None
  if identity is None:
    return types.Passage.of(title, text)
  return types.Passage(identity, title, text)


def split_contents(contents: str, title: str = "") -> tuple[str, str]:
  """Returns (title, text) of a passage in one field.

  Args:
    contents: title, line break, text; without a line break all of it is text.
    title: where it is known, all is text as well, but for a first line that
      repeats it, with quotes around it or not.
  """
  first, line_break, rest = contents.partition("\n")
  first = first.removesuffix("\r")
  if title.strip():
    again = first.strip().strip('"') == title.strip().strip('"')
    return title, rest if line_break and again else contents
  return (first, rest) if line_break else ("", contents)


def missing(value: Any) -> bool:
  """Returns whether a value is null, as JSON or as pandas writes it."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def empty(value: Any) -> bool:
  """Returns whether a value is null, blank or holds nothing.

  A list of empty lists holds nothing, nor does an object of empty columns, nor
  the JSON text of either.
  """
  if missing(value):
    return True
  value = parsed(value)
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    return all(isinstance(v, (list, tuple)) and empty(v) for v in value)
  return isinstance(value, str) and not value.strip()


def label(value: Any, row: Row, name: str) -> str:
  """Returns text, or a number as text; 1998.0 is 1998.

  Raises:
    files.DataError: it is something else.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, float) and math.isfinite(value):
    return str(int(value)) if value.is_integer() else repr(value)
  raise row.error(name, "strings", value)


def parsed(value: Any) -> Any:
  """Returns a list or object that stands in a field as its JSON text.

  Or as Python prints it. NumPy prints lists without commas: they stay text, as
  Python would join their strings.
  """
  if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
    return value
  for parse in (json.loads, ast.literal_eval):  # The latter as str() writes.
    try:
      found = parse(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue
    if not isinstance(found, (list, tuple, dict)) or (
      parse is ast.literal_eval and _joins(value)
    ):
      break
    return found
  return value


def printed_list(text: str) -> bool:
  """Returns whether a text is that of a list that holds strings, as printed.

  Whether it can be read back or not: NumPy's lack the commas, and `nan` is no
  value of JSON or Python. "[untitled]" and "['Salem's Lot]" are none.
  """
  if not text.lstrip().startswith(("[", "{", "array(")) or (
    not text.rstrip().endswith(("]", "}", ")"))
    or isinstance(parsed(text), Mapping)
  ):
    return False
  tokens = _tokens(text)
  return any(token.type == tokenize.STRING for token in tokens) and all(
    token.type != tokenize.NAME or token.string in _PRINTED for token in tokens
  )


def _joins(text: str) -> bool:
  """Returns whether Python reads two strings of a text as one."""
  return any(
    a.type == b.type == tokenize.STRING
    for a, b in itertools.pairwise(_tokens(text))
  )


def _tokens(text: str) -> list[tokenize.TokenInfo]:
  """Returns the Python tokens of a text, none where it is no such text."""
  try:
    found = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
  except (tokenize.TokenError, SyntaxError):
    return []
  if any(token.type == tokenize.ERRORTOKEN for token in found):
    return []
  return [token for token in found if token.string.strip()]


def _only_texts(value: Any) -> bool:
  return isinstance(value, (list, tuple)) and bool(value) and all(
    isinstance(item, str) for item in value
  )


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
