"""Checks, supervises, audits and converts question files before a run.

  stepsearch data --check --input=train.jsonl
  stepsearch data --check --json --input=train.jsonl
  stepsearch data --input=musique.jsonl \\
    --supervise --writers=rules,Qwen/Qwen2.5-7B-Instruct \\
    --retrievers=intfloat/e5-base-v2,bm25,hashed_tfidf --output=train.jsonl
  stepsearch data --input=dev.jsonl --audit \\
    --corpus=wiki-18.jsonl.gz --merged=wiki-18-complete.jsonl
  stepsearch data --input=train.parquet \\
    --tfds_dir=gs://bucket/tfds --name=musique --split=train

`--check` prints the first questions as the policy will see them, with the
rewards of a perfect, an empty and a wrong answer, so that a wrong schema shows
before a run and not after a day; it says which fields were read, which were
ignored and which would be accepted. `--check --json` prints every question that
was read, as a JSON list. `--supervise` writes search keys for every
sub-question and keeps those that most retrievers answer; it goes on where it
was killed. `--audit` counts the gold passages that a corpus lacks.
"""

from __future__ import annotations

import itertools
import json

import tqdm
from absl import flags, logging
from etils import epath

from stepsearch_jax import cli, types
from stepsearch_jax.data import questions as questions_lib
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.rewards import step_rewards, token_rewards

_INPUT = flags.DEFINE_string(
  "input", None, "Question file (.jsonl, .json, .parquet, or .gz)."
)
_CHECK = flags.DEFINE_bool("check", False, "Print rows, prompts and rewards.")
_AS_JSON = flags.DEFINE_bool(
  "json", False, "With --check: print every question as JSON, nothing else."
)
_ROWS = flags.DEFINE_integer("rows", 3, "How many questions --check prints.")
_TEMPLATE = flags.DEFINE_enum(
  "template", "stepsearch", sorted(prompts.TEMPLATES), "Prompt of --check."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "With it --check adds the chat template and token counts."
)
_PRESET = flags.DEFINE_enum(
  "preset", "paper", sorted(step_rewards.PRESETS), "Reward of --check."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Use only so many questions.")
_SUPERVISE = flags.DEFINE_bool("supervise", False, "Write search keys.")
_WRITERS = flags.DEFINE_list(
  "writers", ["rules"],
  "Who writes queries: rules, a local model (HF folder or id, *.gguf, "
  "package:<name>), or URL#MODEL of an OpenAI-compatible endpoint (key in "
  "OPENAI_API_KEY).",
)
_RETRIEVERS = flags.DEFINE_list(
  "retrievers", ["hashed_tfidf", "bm25"],
  "Which retrievers judge the queries: bm25, hashed_tfidf, BERT encoders, or "
  "the URL of a /retrieve server.",
)
_QUERIES = flags.DEFINE_integer(
  "queries", 3, "Queries per sub-question and writer.", 1
)
_TOPK = flags.DEFINE_integer("topk", 3, "Passages that a retriever shows.", 1)
_CORPUS = flags.DEFINE_string(
  "corpus", None, "Passages; default the paragraphs of --input."
)
_CACHE = flags.DEFINE_string(
  "cache", "supervision_cache", "Folder for completions and indexes."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Where --supervise writes (.jsonl or .parquet; with "
  "--tfds_dir also TFDS); a report lies beside it.",
)
_AUDIT = flags.DEFINE_bool("audit", False, "What of the gold --corpus lacks.")
_MERGED = flags.DEFINE_string(
  "merged", None, "Write --corpus plus what it lacks to this .jsonl file."
)
_TFDS_DIR = flags.DEFINE_string("tfds_dir", None, "Write a TFDS dataset here.")
_NAME = flags.DEFINE_string("name", "custom", "Name of the TFDS dataset.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of the TFDS dataset.")


def trial_rewards(
  spec: step_rewards.RewardSpec, question: types.Question
) -> dict[str, step_rewards.RewardParts]:
  """Rewards of a perfect, an empty and a wrong trajectory.

  The perfect one asks the first key of every sub-question, one a turn, is
  shown one gold paragraph a turn and gives the first answer.
  """
  goal = token_rewards.gold(question)
  asked = [group[0] for group in question.search_keys if group]
  shown = [[passage.text] for passage in question.support]
  trials = {
    "perfect": step_rewards.Evidence(asked, shown, question.answers[0], True),
    "empty": step_rewards.Evidence([], [], None, False),
    "wrong": step_rewards.Evidence([], [], "(a wrong answer)", True),
  }
  return {
    name: step_rewards.score(spec, evidence, goal)
    for name, evidence in trials.items()
  }


def print_json(questions: list[types.Question]) -> None:
  """Prints questions as a JSON list, one line per question."""
  lines = [
    json.dumps({
      "id": question.id,
      "source": question.source,
      "question": question.text,
      "answers": list(question.answers),
      "search_keys": [list(group) for group in question.search_keys],
      "support": [
        {"title": p.title, "text": p.text} for p in question.support
      ],
    }, ensure_ascii=False)
    for question in questions
  ]
  print("[\n" + ",\n".join(lines) + "\n]")


def print_fields(report: questions_lib.Report) -> None:
  """Prints which fields of the rows were read, ignored and would be read."""
  for what, counts in (("read", report.used), ("ignored", report.ignored)):
    shown = (
      name if count == report.rows else f"{name} ({count} of {report.rows})"
      for name, count in sorted(counts.items())
    )
    print(f"fields {what:9} {', '.join(shown) or 'none'}")
  would = [name for name in questions_lib.ACCEPTED if name not in report.used]
  print(f"fields accepted  {', '.join(would)}")
  for note in report.notes():
    print(note)


def check(found: questions_lib.QuestionFile) -> None:
  """Prints what a run would make of the first questions."""
  questions = found.questions
  spec = step_rewards.PRESETS[_PRESET.value]()
  env = search_env.SearchEnv(
    prompts.TEMPLATES[_TEMPLATE.value], max_turns=0, topk=1  # Prompts only.
  )
  tokenizer = _TOKENIZER.value and tokenizer_lib.load(_TOKENIZER.value)
  for question in questions[: _ROWS.value]:
    prompt = env.prompt(question)
    print(f"=== {question.source or 'unknown source'}  {question.id}")
    if tokenizer:
      prompt = tokenizer.chat_prompt(prompt)
      print(f"--- prompt, {len(tokenizer.encode(prompt, special=True))} tokens")
    print(prompt.rstrip())
    print(f"--- answers      {list(question.answers)}")
    print(f"--- search keys  {[list(group) for group in question.search_keys]}")
    print(f"--- support      {[p.title for p in question.support]}")
    for name, scores in trial_rewards(spec, question).items():
      steps = ", ".join(f"{step:.3f}" for step in scores.step_scores)
      print(f"--- {name:8} outcome {scores.score:6.3f} (answer "
            f"{scores.answer_correct:.3f}, keys {scores.search_key_score:.3f})"
            f", steps [{steps}]")
  print(f"\n{len(questions)} questions")
  print_fields(found.report)
  for what, lacking, loss in (
    ("search keys", [q for q in questions if not q.search_keys],
     "their search-key reward is 0"),
    ("supporting paragraphs", [q for q in questions if not q.support],
     "they can be evaluated, not trained on with step rewards"),
    ("a decomposition", [q for q in questions if not q.decomposition],
     "they cannot be scripted for a warm start, without which a new model "
     "learns no searching; --supervise writes one"),
    ("labels of their own", [
      q for q in questions if q.extra.get("pseudo_support")
     ], "their supporting paragraphs only hold the sub-answers"),
  ):
    if lacking:
      print(f"{len(lacking)} without {what}: {loss}")
  for reason, count in found.report.reasons.most_common():
    print(f"{count} without supporting paragraphs: {reason}")


def audit(questions: list[types.Question]) -> None:
  """Prints what the corpus lacks; writes a corpus that lacks nothing."""
  from stepsearch_jax.data import coverage
  from stepsearch_jax.retrieval.index import corpus

  if not _CORPUS.value:
    raise types.UserError("--audit needs --corpus")
  counts, missing = coverage.audit(
    questions,
    tqdm.tqdm(corpus.stream_corpus(_CORPUS.value), "audit", unit="passage"),
  )
  for name, count in counts.items():
    print(f"{name:24}{count:10d}")
  if _MERGED.value:
    both = itertools.chain(corpus.stream_corpus(_CORPUS.value), missing)
    count = corpus.write_corpus(epath.Path(_MERGED.value), both)
    print(f"{count} passages: {_MERGED.value}")


def supervise(questions: list[types.Question]) -> None:
  """Runs the step-supervision pipeline."""
  from stepsearch_jax.retrieval.index import corpus
  from stepsearch_jax.supervision import supervise as pipeline

  if not _OUTPUT.value or not _OUTPUT.value.endswith((".jsonl", ".parquet")):
    raise types.UserError(
      "--supervise needs --output=<file>.jsonl or .parquet, got "
      f"{_OUTPUT.value!r}"
    )
  if all(pipeline.is_url(name) for name in _RETRIEVERS.value):
    passages = []  # Servers have their own.
  elif _CORPUS.value:
    passages = corpus.load_corpus(_CORPUS.value)
  else:
    passages = corpus.corpus_from_questions([_INPUT.value])
  print(pipeline.supervise(
    questions, passages,
    pipeline.Supervision(
      _WRITERS.value, _RETRIEVERS.value, _QUERIES.value, _TOPK.value,
      epath.Path(_CACHE.value),
    ),
    epath.Path(_OUTPUT.value),
  ))
  print(f"--config.data.train={_OUTPUT.value}")


def main() -> None:
  """Entry; see the module docstring."""
  if not (_CHECK.value or _TFDS_DIR.value or _SUPERVISE.value or _AUDIT.value):
    raise types.UserError(
      "nothing to do: give --check, --supervise, --audit or --tfds_dir"
    )
  found = questions_lib.read_questions(_INPUT.value, limit=_LIMIT.value)
  questions = found.questions
  if _CHECK.value and _AS_JSON.value:
    print_json(questions)
  elif _CHECK.value:
    check(found)
  if _AS_JSON.value or not _CHECK.value:
    for note in found.report.notes():
      logging.warning("%s", note)
  if _AUDIT.value:
    audit(questions)
  if _SUPERVISE.value:
    try:
      supervise(questions)
    except types.SearchError as error:
      raise types.UserError(
        f"{error} (the same command goes on where it stopped)"
      ) from error
  if _TFDS_DIR.value:
    from stepsearch_jax.data.datasets import multihop_qa

    source = _OUTPUT.value if _SUPERVISE.value else _INPUT.value
    reference = multihop_qa.build(
      epath.Path(source), _TFDS_DIR.value, _SPLIT.value, _NAME.value
    )
    print(f"--config.data.train={reference}")


if __name__ == "__main__":
  cli.run(main, required=["input"])
