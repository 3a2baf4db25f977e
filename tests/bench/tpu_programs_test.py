"""The comparison with Tunix's programs, as far as nothing is compiled."""

import types

import jax
import pytest

from stepsearch_jax.bench import hlo_costs, tpu_programs

TINY = tpu_programs.TINY


class Done:
  """A compiled program."""

  def memory_analysis(self):
    return types.SimpleNamespace(
      argument_size_in_bytes=100, temp_size_in_bytes=20,
      output_size_in_bytes=50, alias_size_in_bytes=40,
    )

  def cost_analysis(self):
    return {"flops": 3.0, "bytes accessed": 4.0}

  def as_text(self):
    return "compiled"


class Lowered:
  """A program that counts how often it is compiled."""

  def __init__(self, text):
    self.text, self.compiled = text, 0

  def as_text(self):
    return self.text

  def compile(self):
    self.compiled += 1
    return Done()


def test_memory_that_is_written_in_place_counts_once():
  assert tpu_programs.Kept.of(Done()).peak == 130


def test_a_program_in_the_folder_is_not_compiled_again(tmp_path):
  pytest.importorskip("libtpu")
  first, same, other = Lowered("a"), Lowered("a"), Lowered("b")
  found = [tpu_programs._compile(x, str(tmp_path / "kept"))
           for x in (first, same, other)]
  assert [x.compiled for x in (first, same, other)] == [1, 0, 1]
  assert found == [tpu_programs.Kept("compiled", 100, 50, 40, 20, 3, 4)] * 3


def test_policy_tokens_come_in_chunks_of_whole_size():
  config, _ = tpu_programs._config(tpu_programs.Work())
  # 2 rows a chip x 2,048 x .13 = 532 tokens, 384 at a time.
  assert dict(config.mesh, rules="") == {
    "data": 1, "fsdp": 8, "tensor": 2, "rules": "",
  }
  assert tpu_programs._chunks(tpu_programs.Work(), config) == 2


def test_both_sides_and_every_figure_are_compared(monkeypatch):
  ours = tpu_programs.Figures(64, 2e9, hlo_costs.Costs(3e12, 4e9, 5e9))
  theirs = tpu_programs.Figures(64, 4e9, hlo_costs.Costs(9e12, 4e9, 1e9))
  for name in ("our_update", "our_decode"):
    monkeypatch.setattr(tpu_programs, name, lambda work: ours)
  for name in ("tunix_update", "tunix_decode"):
    monkeypatch.setattr(tpu_programs, name, lambda work: theirs)
  monkeypatch.setattr("stepsearch_jax.bench.duel._SETTLE", 0.0)
  found = [list(item.measure(3))[-1] for item in tpu_programs.duels("tiny")]
  assert [r["ratio"] for r in found] == [2, 3, 1, pytest.approx(0.2)] * 2
  assert [(r["ours"], r["unit"]) for r in found] == [
    (2, "GB"), (3, "TFLOP"), (4, "GB"), (5, "GB"),
    (2, "GB"), (3000, "GFLOP"), (4, "GB"), (5000, "MB"),
  ]


def test_other_work_is_refused():
  with pytest.raises(ValueError, match="about 3 tokens, Tunix's about 4"):
    tpu_programs._same(3, 4)


@pytest.fixture
def step():
  pytest.importorskip("tunix")
  pytest.importorskip("libtpu")
  return tpu_programs._peer(TINY)


@pytest.mark.slow
def test_tunix_trains_and_decodes_the_shapes_of_ours(step):
  with jax.numpy_dtype_promotion("standard"):  # As outside of tests.
    update = tpu_programs.tunix_programs.update(*step).as_text()
    decode = tpu_programs.tunix_programs.decode(*step).as_text()
  # Two layers of weights, split over both axes, and half of the micro-batch's
  # tokens behind the prompt.
  assert "tensor<8x768xi32>" in update and "tensor<8x256xi32>" in update
  assert "tensor<2048x11008xf32>" in update
  assert "tensor<16x1024x2x128xbf16>" in decode
  assert "tensor<2048x11008xbf16>" in decode
