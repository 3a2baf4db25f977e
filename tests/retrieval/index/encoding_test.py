"""Pooling, prefixes and length come from the model's files, not its name."""

import json

import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.retrieval.index import encoding


def folder(path, **files):
  """A model folder in the layout of sentence-transformers."""
  path.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    where = path / {
      "modules": "modules.json", "pooling": "1_Pooling/config.json",
      "prompts": "config_sentence_transformers.json",
      "length": "sentence_bert_config.json",
    }[name]
    where.parent.mkdir(exist_ok=True)
    where.write_text(json.dumps(content))
  return epath.Path(path)


def spec(**changes):
  names = ("pooling", "query_prefix", "passage_prefix", "max_length")
  return encoding.EncodingSpec(**dict.fromkeys(names) | changes)


def modules(*kinds):
  return [
    {"path": f"{i}_{kind}" if i else "",
     "type": f"sentence_transformers.models.{kind}"}
    for i, kind in enumerate(kinds)
  ]


def test_files_win_over_the_spelling_of_the_path(tmp_path):
  path = folder(
    tmp_path / "my-e5-copy",
    modules=modules("Transformer", "Pooling", "Normalize"),
    pooling={"word_embedding_dimension": 384, "pooling_mode_cls_token": True,
             "pooling_mode_mean_tokens": False},
    prompts={"prompts": {"query": "ask: ", "document": "text: "}},
    length={"max_seq_length": 64, "do_lower_case": False},
  )
  assert encoding.resolve("my-e5-copy", path, spec()) == encoding.EncodingSpec(
    "cls", "ask: ", "text: ", 64
  )


def test_the_users_word_wins_over_the_files(tmp_path):
  path = folder(
    tmp_path, pooling={"pooling_mode_cls_token": True},
    prompts={"prompts": {"query": "ask: "}}, length={"max_seq_length": 64},
  )
  said = spec(pooling="mean", query_prefix="", max_length=32)
  assert encoding.resolve("x", path, said) == encoding.EncodingSpec(
    "mean", "", "", 32
  )


@pytest.mark.parametrize("name, expected", [
  ("intfloat/e5-base-v2", ("mean", "query: ", "passage: ", 256)),
  ("BAAI/bge-base-en", (
    "cls", "Represent this sentence for searching relevant passages: ", "",
    512)),
  ("plain", ("mean", "", "", 256)),
])
def test_a_folder_that_says_nothing_is_encoded_as_its_family(
  tmp_path, name, expected
):
  assert encoding.resolve(name, tmp_path, spec()) == encoding.EncodingSpec(
    *expected
  )


def test_newer_folders_name_pooling_and_default_prompt(tmp_path):
  path = folder(
    tmp_path, pooling={"pooling_mode": "cls"},
    prompts={"prompts": {"web": "q: ", "query": "", "document": ""},
             "default_prompt_name": "web"},
  )
  found = encoding.resolve("x", path, spec())
  assert found.pooling == "cls" and found.query_prefix == "q: "


@pytest.mark.parametrize("files, message", [
  ({"pooling": {"pooling_mode_max_tokens": True}},
   r"1_Pooling/config.json: pooling max_tokens is not supported"),
  ({"pooling": {"pooling_mode_mean_tokens": True,
                "pooling_mode_cls_token": True}},
   r"pooling mean_tokens \+ cls_token is not"),
  ({"pooling": {"pooling_mode": "lasttoken"}}, "pooling lasttoken is not"),
  ({"modules": modules("Transformer", "Pooling", "Dense")},
   "module Dense is not supported"),
])
def test_what_is_not_supported_is_refused_by_name(tmp_path, files, message):
  path = folder(tmp_path, **files)
  with pytest.raises(types.UserError, match=message):
    encoding.resolve("x", path, spec())


def test_unsupported_pooling_can_be_overridden(tmp_path):
  path = folder(tmp_path, pooling={"pooling_mode_max_tokens": True})
  assert encoding.resolve("x", path, spec(pooling="mean")).pooling == "mean"


@pytest.mark.parametrize("changes, message", [
  ({"pooling": "max"}, "pooling must be mean or cls, got 'max'"),
  ({"max_length": 0}, "max_length must be positive, got 0"),
])
def test_impossible_settings_are_refused(changes, message):
  with pytest.raises(types.UserError, match=message):
    spec(**changes)
