"""The question inside a prompt, by messages and chat templates of several."""

import pytest

from stepsearch_jax import files
from stepsearch_jax.data import questions


def parse(prompt):
  row = {"prompt": prompt, "reward_model": {"ground_truth": "A"}}
  return questions.parse_question("f.jsonl:7", row).text


def said(*pairs):
  return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("prompt", [
  said(("User", "Question: who?"), ("assistant", "I think")),
  said((" USER ", "who?"), ("Assistant", "I think"), ("tool", "Found.")),
  said(("user", "Question: me?"), ("assistant", "You."), ("user", "who?")),
])
def test_the_last_message_of_a_user_counts_however_the_role_is_written(prompt):
  assert parse(prompt) == "who?"


@pytest.mark.parametrize("prompt", [
  said(("assistant", "Question: who?")), said(("system", "who?")),
  [{"content": "who?"}], [{"from": "human", "value": "who?"}],
  said(("user", " ")), said(("user", "<|im_start|>")),
])
def test_a_prompt_without_a_message_of_a_user_is_refused(prompt):
  with pytest.raises(
    files.DataError, match="f.jsonl:7: field prompt must .* of role user, got"
  ):
    parse(prompt)


CHATML = "<|im_start|>{}\n{}<|im_end|>\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"


@pytest.mark.parametrize("prompt", [
  "Answer it.\nQuestion: who?<|im_end|>\n<|im_start|>assistant\n",
  CHATML.format("user", "Question: who?") + "<|im_start|>assistant\n<think>",
  CHATML.format("system", "Be good.") + CHATML.format("user", "who?")
  + "<|im_start|>assistant\n",
  CHATML.format("User", "Question: me?") + CHATML.format("assistant", "You.")
  + CHATML.format("user", "who?"),
  "<|begin_of_text|>" + LLAMA.format("system", "Question: why?")
  + LLAMA.format("user", "who?")
  + "<|start_header_id|>assistant<|end_header_id|>\n\n",
  "<|begin_of_text|>Question: who?<|end_of_text|>", "who?<|endoftext|>",
])
@pytest.mark.parametrize("role", [None, "user"])
def test_the_marks_of_a_chat_template_are_no_part_of_the_question(
  prompt, role
):
  assert parse(said((role, prompt)) if role else prompt) == "who?"


def test_a_limit_of_questions_is_at_least_one(tmp_path):
  path = tmp_path / "q.jsonl"
  path.write_text('{"question": "q?", "answer": "A"}\n' * 3)
  for limit, count in ((None, 3), (1, 1), (2, 2), (9, 3)):
    assert len(questions.read_questions(str(path), limit).questions) == count
  for limit in (0, -1):
    with pytest.raises(ValueError, match=f"limit: .* at least 1, got {limit}"):
      questions.read_questions(str(path), limit)
