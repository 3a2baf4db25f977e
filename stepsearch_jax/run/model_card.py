"""The README.md of an exported policy: a model card for the Hugging Face hub.

Everything in it comes from the run: its settings, its newest evaluation of the
exported step, its prompt. Folders are left out of file names, since a card is
made to be shown to others.
"""

from __future__ import annotations

import json
import re
from typing import Any

from etils import epath

from stepsearch_jax import types
from stepsearch_jax.run import methods
from stepsearch_jax.run.experiment import STOP_TAGS, Experiment

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"\A---\n(?:.*\n)*?license:[ \t]*([\w.-]+)")
_TAGS = ["stepsearch", "search-agent", "reinforcement-learning",
         "multi-hop-question-answering"]
_METRICS = {"em": ("exact_match", "exact match"), "f1": ("f1", "F1")}


def newest_evaluation(workdir: epath.Path, step: int) -> dict[str, Any] | None:
  """Returns the card of a checkpoint's newest evaluation, None without one."""
  cards = sorted(
    workdir.glob("evaluations/*/card.json"),
    key=lambda path: (path.stat().mtime, str(path)), reverse=True,
  )
  for path in cards:
    card = json.loads(path.read_text())
    if str(card["settings"].get("model", "")).endswith(f" step {step}"):
      return card
  return None


def render(
  experiment: Experiment, step: int, name: str, license_id: str | None = None,
) -> str:
  """Returns the card as Markdown behind YAML.

  Args:
    experiment: of the run.
    step: of the exported checkpoint.
    name: of the exported folder.
    license_id: as the hub spells it; None for that of a base model in a folder
      whose own card names one, else "unknown".
  """
  base = experiment.settings.model.reference
  card = newest_evaluation(experiment.workdir, step)
  license_id = license_id or _license_of(base) or "unknown"
  head: dict[str, Any] = {
    "library_name": "transformers", "pipeline_tag": "text-generation",
    "license": license_id, "tags": _TAGS,
  }
  if _is_hub_id(base):
    head["base_model"] = base
  if card:
    head["model-index"] = [{"name": name, "results": _results(card)}]
  parts = [
    "---",
    # JSON is YAML, and needs no library to write.
    *(f"{key}: {json.dumps(value, ensure_ascii=False)}"
      for key, value in head.items()),
    "---", f"# {name}", "",
    "A language model that answers multi-hop questions by searching, trained "
    "with stepsearch_jax (StepSearch, arXiv 2505.15107).", "",
    *_table(_facts(experiment, step)), "",
    *_shown_results(card, step), "", *_usage(experiment, name),
  ]
  if license_id == "unknown":
    parts += ["", "## License", "", "Not known to the run: fill in `license` "
              "at the top. Those of the base model and of the data decide."]
  return "\n".join(parts) + "\n"


def _is_hub_id(base: str) -> bool:
  return bool(_HUB_ID.fullmatch(base)) and not epath.Path(base).exists()


def _license_of(base: str) -> str | None:
  """Returns what the card of a base model in a local folder names."""
  path = epath.Path(base) / "README.md" if base else None
  if path is None or not path.exists():
    return None
  found = _LICENSE.match(path.read_text())
  return found[1] if found else None


def _public(text: Any) -> str:
  """Returns text without the folders of paths in it."""
  return re.sub(r"[^\s=,]*/", "", str(text))


def _table(rows: dict[str, Any]) -> list[str]:
  return ["| what | value |", "|---|---|",
          *(f"| {key} | {value} |" for key, value in rows.items())]


def _facts(experiment: Experiment, step: int) -> dict[str, Any]:
  settings = experiment.settings
  base, data = settings.model.reference, settings.data
  world = data.train == "world"
  return {
    "base model": (base if _is_hub_id(base) else _public(base))
    or "none, trained anew",
    "method": methods.described(settings.config),
    "steps": step,
    "seed": settings.seed,
    "training questions": "the embedded world" if world
    else _public(data.train),
    "corpus": _public(data.corpus) or (
      "the embedded world" if world else "paragraphs of the question files"),
    "retrieval engine": settings.config["retrieval"]["engine"],
    "passages per search": settings.protocol.topk,
    "searches per question, at most": settings.protocol.max_turns,
    "tokens per turn, at most": settings.rollout.max_turn,
    "context": settings.sampler.context,
  }


def _results(card: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the results of an evaluation as the hub's model-index has them."""
  return [
    {
      "task": {"type": "question-answering",
               "name": "multi-hop question answering with search"},
      "dataset": {"type": source, "name": source},
      "metrics": [
        {"type": kind, "name": name, "value": row[metric]}
        for metric, (kind, name) in _METRICS.items()
      ],
    }
    for source, row in card["sources"].items()
  ]


def _shown_results(card: dict[str, Any] | None, step: int) -> list[str]:
  if card is None:
    return ["## Results", "", f"Step {step} was not evaluated."]
  lines = ["## Results", "", "| source | n | EM (95 %) | F1 (95 %) |",
           "|---|---|---|---|"]
  for source, row in card["sources"].items():
    cells = [
      f"{row[m]:.4f} ({row[m + '_interval'][0]:.4f}-"
      f"{row[m + '_interval'][1]:.4f})" for m in _METRICS
    ]
    lines.append(f"| {source} | {row['n']} | {' | '.join(cells)} |")
  asked = {k: _public(v) for k, v in card["settings"].items() if k != "model"}
  searches = f"{card['metrics']['searches']:.2f} searches per question"
  return [*lines, "", f"{searches}. What was measured:", "", *_table(asked)]


def _usage(experiment: Experiment, name: str) -> list[str]:
  env, tokenizer = experiment.env, experiment.tokenizer
  prompt = tokenizer.chat_prompt(env.prompt(
    types.Question("", "{question}", ("?",))
  ))
  chat = bool(tokenizer.hf.chat_template)
  reply = env.observation(
    [types.Passage("1", "{title}", "{text}")], 0
  ).text
  python = _PYTHON.format(
    name=name, prompt=prompt, special=not chat, stops=list(STOP_TAGS),
    most=experiment.settings.rollout.max_turn,
  )
  return [
    "## Use", "",
    "The model writes a turn up to `</search>` or `</answer>`. Behind a search "
    "it is shown the passages and goes on. `stepsearch ask --model=" + name +
    " --index=FOLDER` does that, `stepsearch serve-agent` with the same flags "
    "serves it, as stepsearch.json says. The prompt, with the question in "
    "place of `{question}`:", "", *_fenced(prompt), "",
    "What follows a search, here with one passage:", "", *_fenced(reply), "",
    "One turn with transformers:", "", *_fenced(python, "python"), "",
    "With vLLM, `vllm serve " + name + "`, then completions of the same prompt "
    'with `"stop": ["</search>", "</answer>"]` and '
    '`"include_stop_str_in_output": true`.',
  ]


def _fenced(text: str, language: str = "") -> list[str]:
  # Four, because a prompt may have a fence of three.
  return [f"````{language}", text.strip("\n"), "````"]


_PYTHON = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}  # This folder, or where it is on the hub.
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
prompt = {prompt!r}.replace("{{question}}", "...")
ids = tokenizer(prompt, add_special_tokens={special}, return_tensors="pt")
turn = model.generate(
  **ids, max_new_tokens={most}, tokenizer=tokenizer,
  stop_strings={stops},
)
print(tokenizer.decode(turn[0, ids["input_ids"].shape[1]:]))
"""
