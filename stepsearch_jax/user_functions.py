"""Functions of users, named in the config as "module:function".

A module is looked for where Python looks and in the folder where the command
was started, whatever it was started by.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from stepsearch_jax import types


def load(field: str, reference: str) -> Any:
  """Returns what "module:function" names.

  Args:
    field: config field that holds the name, for messages.
    reference: the name.

  Raises:
    UserError: it has another form, or cannot be imported.
  """
  module, _, attribute = reference.partition(":")
  types.expect(
    bool(module and attribute), field, "module:function", reference
  )
  here = os.getcwd()
  if here not in sys.path and "" not in sys.path:
    sys.path.append(here)  # The script `stepsearch` is started elsewhere.
  try:
    found = getattr(importlib.import_module(module), attribute)
  except Exception as error:  # Whatever the user's module raises.
    raise types.UserError(
      f"{field}: expected a function that can be imported, got {reference!r} "
      f"({type(error).__name__}: {types.first_line(error)})"
    ) from error
  types.expect(callable(found), field, "the name of a function", reference)
  return found
