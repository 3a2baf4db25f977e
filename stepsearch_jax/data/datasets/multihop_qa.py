"""TFDS builder of question files, for datasets too large for plain files.

Random access by index, sharded, stored as array_record, so neither building
nor reading needs TensorFlow. Every example holds one question as a JSON record
(`questions.to_row`): TFDS stores ragged nested lists only with TensorFlow.
Build with `tools/prepare_data`; `tfds build` works where TensorFlow is
installed, which its command line imports.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import tensorflow_datasets as tfds
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import questions


@dataclasses.dataclass(kw_only=True)
class QaConfig(tfds.core.BuilderConfig):
  """One dataset.

  Attributes:
    files: split -> file name inside the manual download folder.
  """

  files: Mapping[str, str] = dataclasses.field(default_factory=dict)


class MultihopQa(tfds.core.GeneratorBasedBuilder):
  """Multi-hop questions with decomposition, support and search keys."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Put the dataset's official files into the manual folder."
  )
  BUILDER_CONFIGS = [
    QaConfig(
      name="musique",
      description="MuSiQue-Ans (Trivedi et al. 2022).",
      files={"train": "musique_ans_v1.0_train.jsonl",
             "validation": "musique_ans_v1.0_dev.jsonl"},
    ),
    QaConfig(
      name="stepsearch",
      description="MuSiQue with StepSearch's search keys.",
      files={"train": "musi_answerable_train.jsonl",
             "validation": "musi_answerable_dev.jsonl"},
    ),
    QaConfig(
      name="hotpotqa",
      description="HotpotQA distractor setting (Yang et al. 2018).",
      files={"train": "hotpot_train_v1.1.json",
             "validation": "hotpot_dev_distractor_v1.json"},
    ),
    QaConfig(
      name="2wikimultihopqa",
      description="2WikiMultihopQA (Ho et al. 2020).",
      files={"train": "train.json", "validation": "dev.json"},
    ),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.builder_config.description,
      features=tfds.features.FeaturesDict({
        "id": tfds.features.Text(),
        "question": tfds.features.Text(),
        "record": tfds.features.Text(),
      }),
      disable_shuffling=True,  # File order; training draws its own.
    )

  def _split_generators(self, dl_manager):
    folder = dl_manager.manual_dir
    files = self.builder_config.files
    found = {
      split: folder / name for split, name in files.items()
      if (folder / name).exists()
    }
    if not found:
      raise types.UserError(
        f"{folder}: expected one of {sorted(files.values())}"
      )
    return {
      split: self._generate_examples(path) for split, path in found.items()
    }

  def _generate_examples(self, path):
    for number, question in enumerate(questions.load_questions(str(path))):
      record = json.dumps(questions.to_row(question), ensure_ascii=False)
      yield number, {
        "id": question.id, "question": question.text, "record": record
      }


def build(
  path: epath.PathLike, folder: epath.PathLike, split: str = "train",
  name: str = "custom",
) -> str:
  """Builds a dataset from one question file.

  Args:
    path: question file of any accepted schema.
    folder: TFDS data folder.
    split: name of its only split.
    name: name of the dataset's config.

  Returns:
    The reference that `data.train` and `data.eval` take.
  """
  builder = MultihopQa(
    data_dir=str(folder),
    config=QaConfig(name=name, files={split: path.name}),
    file_format="array_record",
  )
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=str(path.parent))
  )
  return f"tfds:{builder.data_path}:{split}"
