"""Prompts, ends and dates of tokenizers, against hand-made ones."""

import datetime
import json

import fakes
import pytest
import tokenizers
import transformers
from tokenizers import processors

from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.types import UserError

TEMPLATE = (
  "{%- if enable_thinking is defined and enable_thinking is false %}"
  "<no>{% else %}<yes>{% endif %}"
  "{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}"
)


def make(bos=False, template=None, **arguments):
  backend = tokenizers.Tokenizer.from_str(
    fakes.make_tokenizer().hf.backend_tokenizer.to_str()
  )
  if bos:
    backend.post_processor = processors.TemplateProcessing(
      single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
  hf = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<|im_start|>",
    eos_token="<|im_end|>", pad_token="<|pad|>",
  )
  hf.chat_template = template
  return tokenizer_lib.Tokenizer(hf, **arguments)


@pytest.fixture
def folder(tmp_path):
  make().save(tmp_path)
  return tmp_path


def test_base_models_get_the_bos_that_their_tokenizer_adds():
  plain, adding = make(), make(bos=True)
  ids = plain.encode("Who directed it?")
  assert plain.encode_prompt("Who directed it?") == ids
  assert adding.encode_prompt("Who directed it?") == [1, *ids]
  assert adding.encode("Who directed it?") == ids  # Observations get none.


def test_a_template_writes_its_bos_itself():
  adding = make(bos=True, template="<|im_start|>{{ messages[0].content }}")
  assert adding.encode_prompt("Ada").count(1) == 1


def test_bos_survives_saving(tmp_path):
  make(bos=True).save(tmp_path)
  again = tokenizer_lib.load(str(tmp_path))
  assert again.encode_prompt("Ada")[0] == 1


def test_thinking_is_switched_by_the_chat_fields():
  def prompt(**chat):
    return make(template=TEMPLATE, chat=chat).chat_prompt("Ada")

  assert prompt().startswith("<yes>")
  assert prompt(enable_thinking=None).startswith("<yes>")
  assert prompt(enable_thinking=False).startswith("<no>")


def test_a_chat_field_that_the_template_does_not_know_is_refused():
  for template in (TEMPLATE, None):
    with pytest.raises(UserError, match="model.chat.thoughts: the chat templa"):
      make(template=template, chat=dict(thoughts=False))


def test_the_date_of_a_template_is_the_runs():
  given = make(template=TEMPLATE, date="2026-01-31")
  assert given.chat_prompt("Ada") == "<yes>31 Jan 2026|Ada"
  assert given.date == "2026-01-31"
  today = make(template=TEMPLATE)
  assert today.date == datetime.date.today().isoformat()
  with pytest.raises(UserError, match="2026-11-26, got '31.1.2026'"):
    make(date="31.1.2026")


@pytest.mark.parametrize(("files", "ends"), [
  ({"generation_config.json": {"eos_token_id": [7, 9]}}, {7, 9}),
  ({"generation_config.json": {"eos_token_id": 7}}, {7}),
  ({"config.json": {"eos_token_id": 8}}, {8}),
  ({"generation_config.json": {"eos_token_id": [7]},
    "config.json": {"eos_token_id": 8}}, {7}),
  ({"generation_config.json": {"do_sample": True}}, set()),
])
def test_end_tokens_come_from_generation_config_too(folder, files, ends):
  own = set(tokenizer_lib.load(str(folder)).eos_ids)
  for name, content in files.items():
    content = {"model_type": "llama"} | content
    (folder / name).write_text(json.dumps(content))
  assert set(tokenizer_lib.load(str(folder)).eos_ids) == own | ends


def test_end_tokens_outside_the_vocabulary_are_refused(folder):
  (folder / "generation_config.json").write_text('{"eos_token_id": [99999]}')
  with pytest.raises(UserError, match="eos_token_id must be below"):
    tokenizer_lib.load(str(folder))


def test_padding_never_ends_a_text():
  ending = make(end_ids=(3,))  # Its padding token.
  assert 3 in ending.eos_ids and ending.pad_id not in ending.eos_ids


PROTOCOL = ["<search> Kes mayor </search><information>The mayor of Kes is Mira."
         " </information>"] * 20


@pytest.fixture(scope="module")
def learned():
  return tokenizer_lib.train_bpe(PROTOCOL, 420)


@pytest.mark.parametrize("piece", [
  "<search>", " </search>", "<information>", " </information>", " mayor",
])
def test_a_frequent_tag_or_word_is_one_token(learned, piece):
  assert len(learned.encode(piece)) == 1


def test_what_stands_around_a_tag_does_not_change_it(learned):
  tag = learned.encode("<search>")
  for before in (".", "\n", " </information>"):
    text = f"{before}<search> Kes"
    assert learned.encode(text) == [
      *learned.encode(before), *tag, *learned.encode(" Kes")
    ]


@pytest.mark.parametrize("text", [
  "N\u00e9e 1984?\n\n  x</b><c d> a<b", "", " ", "<|im_end|>", "it's <3",
])
def test_text_comes_back_as_it_was(learned, text):
  assert learned.decode(learned.encode(text)) == text


def test_digits_are_tokens_of_their_own(learned):
  assert [learned.decode([i]) for i in learned.encode("1984")] == list("1984")
