"""How a BERT-family encoder wants its texts: pooling, prefixes, length.

A model folder in the layout of sentence-transformers says it in modules.json,
1_Pooling/config.json, config_sentence_transformers.json and
sentence_bert_config.json. What a spec names wins over the files, and the files
over what the families below were trained with.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from absl import logging
from etils import epath

from stepsearch_jax import types

# (part of the name, pooling, query prefix, passage prefix, maximum length).
_FAMILIES = (
  ("e5", "mean", "query: ", "passage: ", 256),
  ("bge", "cls",
   "Represent this sentence for searching relevant passages: ", "", 512),
  ("", "mean", "", "", 256),
)
_POOLINGS = {
  "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
}
_MODULES = ("Transformer", "Pooling", "Normalize")
_QUERY, _PASSAGE = ("query",), ("passage", "document", "corpus")


@dataclasses.dataclass(frozen=True)
class EncodingSpec:
  """What the user says about an encoder; None leaves it to the model.

  Attributes:
    pooling: "mean" or "cls".
    query_prefix: text put before queries.
    passage_prefix: text put before passages.
    max_length: tokens kept, special ones included.
  """

  pooling: str | None
  query_prefix: str | None
  passage_prefix: str | None
  max_length: int | None

  def __post_init__(self):
    if self.pooling not in (None, "mean", "cls"):
      raise types.UserError(
        "retrieval.encoding.pooling must be mean or cls, got "
        f"{self.pooling!r}"
      )
    if self.max_length is not None and self.max_length < 1:
      raise types.UserError(
        "retrieval.encoding.max_length must be positive, got "
        f"{self.max_length}"
      )


# Leaves everything to the model.
FROM_MODEL = EncodingSpec(None, None, None, None)


def resolve(
  reference: str, folder: epath.PathLike, spec: EncodingSpec
) -> EncodingSpec:
  """Returns the encoding of a model, every field set.

  Args:
    reference: the model as the user named it; tells the family.
    folder: of its files.
    spec: fields that win.

  Raises:
    UserError: the folder asks for something that is not supported here.
  """
  folder = epath.Path(folder)
  family = next(f for f in _FAMILIES if f[0] in reference.lower())
  values: dict[str, Any] = dict(
    zip(dataclasses.asdict(spec), family[1:], strict=True)
  )
  found = {
    "pooling": _pooling(folder, spec), **_prefixes(folder),
    "max_length": _read(folder / "sentence_bert_config.json")
    .get("max_seq_length"),
  }
  for said in (found, dataclasses.asdict(spec)):
    values |= {k: v for k, v in said.items() if v is not None}
  logging.info("encoder %s: %s", reference, values)
  return EncodingSpec(**values)


def _read(path: epath.Path):
  """Content of a JSON file, {} where there is none."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise types.UserError(f"{path}: no JSON: {error}") from error


def _pooling(folder: epath.Path, spec: EncodingSpec) -> str | None:
  where = "1_Pooling"
  for module in _read(folder / "modules.json"):
    kind = module["type"].rpartition(".")[2]
    if kind not in _MODULES:
      raise types.UserError(
        f"{folder}/modules.json: module {kind} is not supported, only "
        f"{', '.join(_MODULES)}"
      )
    if kind == "Pooling":
      where = module["path"]
  given = _read(folder / where / "config.json")
  modes = [name.removeprefix("pooling_mode_") for name, on in given.items()
           if name.startswith("pooling_mode_") and on is True]
  if "pooling_mode" in given:  # Newer folders name the mode.
    modes = [given["pooling_mode"]]
  if not modes or spec.pooling:
    return None
  names = {key.removeprefix("pooling_mode_"): value
           for key, value in _POOLINGS.items()}
  names |= {value: value for value in _POOLINGS.values()}
  if len(modes) > 1 or modes[0] not in names:
    raise types.UserError(
      f"{folder}/{where}/config.json: pooling {' + '.join(modes)} is not "
      "supported, only mean or cls; retrieval.encoding.pooling overrides it"
    )
  return names[modes[0]]


def _prefixes(folder: epath.Path) -> dict[str, str | None]:
  given = _read(folder / "config_sentence_transformers.json")
  prompts = given.get("prompts") or {}
  default = prompts.get(given.get("default_prompt_name"))

  def prompt(names):
    return next((prompts[n] for n in names if prompts.get(n)), default)

  return {"query_prefix": prompt(_QUERY), "passage_prefix": prompt(_PASSAGE)}
