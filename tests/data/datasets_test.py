"""TFDS datasets without TensorFlow, read like any question file."""

import sys

import pytest
from etils import epath

from stepsearch_jax import files
from stepsearch_jax.data import questions
from stepsearch_jax.data.datasets import multihop_qa


def test_a_built_dataset_gives_back_the_same_questions(shared, tmp_path):
  path = epath.Path(shared / "data/musique/musique_ans_train_100.jsonl")
  reference = multihop_qa.build(path, tmp_path, "train", "musique_100")
  assert questions.load_questions(reference) == questions.load_questions(
    str(path)
  )
  assert "tensorflow" not in sys.modules
  with pytest.raises(files.DataError, match="no split 'test', there are"):
    questions.load_questions(reference.removesuffix("train") + "test")


def test_official_file_names_are_found_by_config(shared, tmp_path):
  rows = (shared / "data/hotpotqa/hotpot_train_100.jsonl").read_text()
  manual = tmp_path / "manual"
  manual.mkdir()
  listed = "[" + ",".join(rows.strip().splitlines()) + "]"
  (manual / "hotpot_train_v1.1.json").write_text(listed)
  builder = multihop_qa.MultihopQa(
    config="hotpotqa", data_dir=str(tmp_path), file_format="array_record"
  )
  import tensorflow_datasets as tfds

  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=str(manual))
  )
  assert builder.info.splits["train"].num_examples == 100
  assert "validation" not in builder.info.splits


def test_absent_dataset_is_one_clear_line(tmp_path):
  with pytest.raises(files.DataError, match="no prepared dataset in"):
    questions.load_questions(f"tfds:{tmp_path}/nothing:train")
