"""What stands behind the colon of `--config=file.py:key=value,flag`."""

import ml_collections


def parse_arg(
  arg: str | None, **defaults: str | float
) -> ml_collections.ConfigDict:
  """Reads `--config=file.py:key=value,flag` into typed values.

  Args:
    arg: text behind the colon, or None.
    **defaults: accepted keys; a value is converted to its default's type and
      a bare boolean key means True.

  Returns:
    A ConfigDict with every key of `defaults`.

  Raises:
    ValueError: a key that is not in `defaults`, or a value of another type.
  """
  values = dict(defaults)
  for part in filter(None, (arg or "").split(",")):
    key, _, text = part.partition("=")
    if key not in defaults:
      raise ValueError(
        f"unknown config argument {key!r}; accepted: {sorted(defaults)}"
      )
    default = defaults[key]
    if isinstance(default, bool):
      if text.lower() not in ("", "true", "false", "0", "1"):
        raise ValueError(f"config argument {key} is a boolean, got {text!r}")
      values[key] = text.lower() in ("", "true", "1")
      continue
    try:
      values[key] = type(default)(text)
    except ValueError as error:
      raise ValueError(
        f"config argument {key} is of type {type(default).__name__}, "
        f"got {text!r}"
      ) from error
  return ml_collections.ConfigDict(values)
