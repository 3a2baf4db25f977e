"""An exported policy plays as it was trained to, wherever it is."""

import json

import pytest
import tiny_agent

from configs import common
from stepsearch_jax import types
from stepsearch_jax.run import exported
from stepsearch_jax.run.settings import Settings


def test_the_protocol_is_carried_and_nothing_else(tmp_path):
  config = tiny_agent.config()
  config.retrieval.topk = 2
  config.model.chat.enable_thinking = False
  config.data.corpus = config.retrieval.index = "home/ada/corpus"
  text = exported.text(Settings.from_config(config).config)
  assert "ada" not in text
  (tmp_path / exported.FILE).write_text(text)
  found = exported.get_config(str(tmp_path))
  assert found.rollout.to_dict() == config.rollout.to_dict()
  assert found.model.reference == str(tmp_path)
  assert (found.model.dtype, found.model.chat.enable_thinking) == (
    "float32", False)
  wanted = common.base().retrieval.to_dict() | {"topk": 2}
  assert found.retrieval.to_dict() == wanted
  Settings.from_config(found)


def test_a_model_from_elsewhere_plays_the_released_protocol(tmp_path):
  found = exported.get_config(str(tmp_path))
  assert found.rollout.to_dict() == common.base().rollout.to_dict()
  assert (found.rollout.template, found.rollout.max_turns) == ("stepsearch", 5)


@pytest.mark.parametrize("text", [
  '{"rollout": {"turns": 3}}', '{"rollout": {"max_turns": "three"}}', "{",
])
def test_what_another_version_wrote_is_one_line(tmp_path, text):
  (tmp_path / exported.FILE).write_text(text)
  with pytest.raises(types.UserError, match="stepsearch.json was written by"):
    exported.get_config(str(tmp_path))


def test_what_was_carried_is_json_of_sections(tmp_path):
  text = exported.text(tiny_agent.config().to_dict())
  assert set(json.loads(text)) == {"model", "retrieval", "rollout"}
