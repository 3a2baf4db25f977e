"""Costs of programs, beside numbers worked out by hand."""

import pytest

from stepsearch_jax.bench import hlo_costs
from stepsearch_jax.bench.hlo_costs import Costs

# Five times: a product of 8 x 8 matrices, summed over four chips. Then the
# result of all of them is gathered, in two pieces of work beside it.
PROGRAM = """HloModule test, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step), metadata={op_name="next"}
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  %z = f32[8,8]{1,0} all-reduce(%y), channel_id=1, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %z)
}

%condition (q: (s32[], f32[8,8])) -> pred[] {
  %q = (s32[], f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] BOUND
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%start (s: f32[8,8]) -> f32[32,8] {
  %s = f32[8,8]{1,0} parameter(0)
  %g1 = f32[32,8]{1,0} all-gather(%s), channel_id=2, \
replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  ROOT %c1 = f32[32,8]{1,0} custom-call(%g1), \
custom_call_target="AsyncCollectiveStart"
}

%goes_on (again: f32[8,8]) -> f32[32,8] {
  %again = f32[8,8]{1,0} parameter(0)
  ROOT %g2 = f32[32,8]{1,0} all-gather(%again), channel_id=2, \
replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
}

ENTRY %main (x0: f32[8,8]) -> f32[32,8] {
  %x0 = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,8]{1,0}) tuple(%zero, %x0)
  %loop = (s32[], f32[8,8]{1,0}) while(%begin), condition=%condition, \
body=%body
  %out = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %f1 = f32[32,8]{1,0} fusion(%out), kind=kCustom, calls=%start
  ROOT %f2 = f32[32,8]{1,0} fusion(%out), kind=kCustom, calls=%goes_on
}
"""


def costs(bound="constant(10)", trips=None):
  try:
    return hlo_costs.Program(PROGRAM.replace("BOUND", bound)).costs(trips)
  except hlo_costs.types.UserError as error:
    pytest.skip(str(error))


def test_collectives_are_counted_once_for_every_trip():
  # All-reduce: 2 x 3/4 of 256 bytes, 5 trips; gather: 3/4 of 1,024, once.
  assert costs().sent == 5 * 384 + 768


def test_arithmetic_is_counted_for_every_trip():
  two = costs("constant(14)").flops - costs().flops
  # 2 x 8^3 for the product, 64 for a sum, and the counter's.
  assert two / 2 == pytest.approx(1024, abs=4 * 64 + 2)
  assert two / 2 >= 1024


def test_the_compilers_own_count_stands_for_the_first_trip():
  program = hlo_costs.Program(PROGRAM.replace("BOUND", "constant(10)"))
  more = program.costs(counted=Costs(5e6, 7e6))
  assert more.sent == costs().sent
  # Four trips more than the one that it contains.
  assert more.flops - 5e6 == pytest.approx(4 / 5 * costs().flops, rel=0.01)


def test_a_computed_bound_asks_for_the_trips():
  bound = "get-tuple-element(%q), index=0"
  with pytest.raises(ValueError, match="how often does body run"):
    costs(bound)
  assert costs(bound, trips=3).sent == 3 * 384 + 768


@pytest.mark.parametrize("line, other", [
  ("%next = s32[] add(%i, %step)", "%next = s32[] fusion(%i), kind=kLoop, "
   "calls=%more"),
  ("%step = s32[] constant(2)", "%step = s32[] negate(%i)"),
  ("%zero = s32[] constant(0)", "%zero = s32[] partition-id()"),
  ("%begin = (s32[], f32[8,8]{1,0}) tuple(%zero, %x0)",
   "%begin = (s32[], f32[8,8]{1,0}) copy(%made)"),
])
def test_a_counter_that_cannot_be_followed_asks_for_the_trips(
  line, other, monkeypatch
):
  text = PROGRAM.replace("BOUND", "constant(10)")
  assert line in text
  # What XLA makes of such a fragment is not the point here.
  monkeypatch.setattr(hlo_costs, "_xla_costs", lambda text: {})
  more = """%more (m: s32[]) -> s32[] {
  %m = s32[] parameter(0)
  ROOT %n = s32[] add(%m, %m)
}

%condition"""
  program = hlo_costs.Program(
    text.replace(line, other).replace("%condition", more, 1)
  )
  with pytest.raises(ValueError, match="how often does body run"):
    program.costs()
  assert program.costs(3).sent == 3 * 384 + 768


def test_groups_of_chips_in_every_notation():
  for groups in ("{{0,1},{2,3}}", "[8,2]<=[16]", "[8,2]<=[2,8]T(1,0)",
                 "mesh['data'=1,'fsdp'=8,'tensor'=2] {'tensor'}"):
    assert hlo_costs.group_size(f"x, replica_groups={groups}, y") == 2
  both = "mesh['data'=1,'fsdp'=8,'tensor'=2] {'fsdp','tensor'}"
  assert hlo_costs.group_size(f"x, replica_groups={both}, y") == 16
  with pytest.raises(ValueError, match="no replica groups"):
    hlo_costs.group_size("%x = f32[2] all-reduce(%y)")


@pytest.mark.parametrize("text, expected", [
  # 16 bytes in every case, among 4 chips.
  ("f32[4] all-gather(%a)", 12),
  ("(f32[1], f32[4]) all-gather-start(%a)", 12),
  ("f32[4] all-reduce(%a)", 24),
  ("(f32[2], f32[2]) all-reduce(%a, %b)", 24),
  ("f32[1] reduce-scatter(%a)", 12),
  ("f32[4] all-to-all(%a)", 12),
  ("f32[4] collective-permute(%a)", 16),
  ("(f32[4], f32[4], u32[], u32[]) collective-permute-start(%a)", 16),
  ("f32[4] collective-permute-done(%a)", 0),
  ("f32[4] fusion(%all-reduce.1)", 0),
])
def test_bytes_that_a_chip_sends(text, expected):
  line = f"  %x = {text}, replica_groups=[2,4]<=[8]"
  assert hlo_costs.sent_bytes(line) == expected


def test_an_all_reduce_of_which_a_part_stays_is_sent_once():
  line = "  %x = f32[4] all-reduce(%a), replica_groups=[2,4]<=[8]"
  assert hlo_costs.sent_bytes(line, scattered=True) == 12


def test_a_kernel_of_attention_leaves_out_blocks_above_the_diagonal():
  line = (
    "  %splash_mqa_NAME_segmented.2 = (bf16[2,8,64,16]{3,2,1,0}) "
    'custom-call(%a, %b, %c), custom_call_target="tpu_custom_call", '
    "operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[2,8,64,16]{3,2,1,0}, "
    "bf16[2,64,16]{2,1,0}}, called=x"
  )
  # 4 x 5 / 2 of 16 blocks.
  product = 2 * 2 * 8 * 64 * 64 * 16 * 10 / 16
  query, key = 2 * 2 * 8 * 64 * 16, 2 * 2 * 64 * 16
  for name, products in (("fwd", 2), ("dq", 3), ("dkv", 4)):
    found = hlo_costs.kernel_costs(line.replace("NAME", name))
    assert found == Costs(products * product, 16 + 2 * query + key)
  with pytest.raises(ValueError, match="unknown kernel"):
    hlo_costs.kernel_costs("  %other.1 = f32[2] custom-call(%a)")


def test_the_decode_kernel_counts_full_slots():
  found = hlo_costs.kernel_costs(
    "  %decode_attention.3 = bf16[4,2,8,16]{3,2,1,0} custom-call(%a, %b, %c), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], '
    "s32[4]{0}, bf16[4,2,8,16]{3,2,1,0}, bf16[4,2,64,16]{3,2,1,0}, "
    "bf16[4,2,64,16]{3,2,1,0}}, called=x"
  )
  query, key = 4 * 2 * 8 * 16, 4 * 2 * 64 * 16
  # q k and weights v, a multiplication and an addition each.
  assert found == Costs(2 * 2 * query * 64, 4 + 16 + 2 * (2 * query + 2 * key))


def test_branches_are_refused():
  with pytest.raises(ValueError, match="branches"):
    hlo_costs.Program("ENTRY %m (x: f32[]) -> f32[] {\n  %c = conditional(%x)")
