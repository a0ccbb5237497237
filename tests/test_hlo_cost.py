"""The price of a program: hand-written HLO with costs that are known."""

import dataclasses

import pytest

from redvillm_jax.planning.hlo_cost import Unpriced, charges, num_bytes
from redvillm_jax.runtime.chips import CHIPS

CHIP = dataclasses.replace(
    CHIPS["v5e"], clock=1e9, hbm_bandwidth=1e9, link_bandwidth=1e9, peak_flops=1e9
)  # a cycle, a byte, and a flop take a nanosecond

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %x = f32[100]{0:T(128)} get-tuple-element(%p), index=1
  %gather = (f32[100]{0}, f32[400]{0}) all-gather-start(%x), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  %work = f32[100]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"500"}}
  %gathered = f32[400]{0} all-gather-done(%gather)
  %kernel.1 = f32[100]{0} custom-call(%work), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], f32[100]{0}) tuple(%i, %kernel.1)
}

%condition (q: (s32[], f32[100])) -> pred[] {
  %q = (s32[], f32[100]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %t = (s32[], f32[100]{0}) tuple(%a)
  %loop = (s32[], f32[100]{0}) while(%t), condition=%condition, body=%body
  %sum = f32[100]{0} all-reduce(%a), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %end = f32[100]{0} fusion(%sum), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"7"}
}
"""


def by_name(found):
    return {charge.name: charge for charge in found}


def test_a_loop_is_charged_as_often_as_it_runs_and_hides_what_it_can():
    found = by_name(charges(PROGRAM, CHIP, {"kernel": 400}))
    # 3 other shards of 400 bytes over a ring used both ways: 600 ns, of which 500 ns of work hide all but 100.
    assert found["gathered"].times == 3
    assert found["gathered"].seconds == pytest.approx(3 * 100e-9)
    assert found["gathered"].busy == pytest.approx(3 * 600e-9)
    assert found["work"].seconds == pytest.approx(3 * 500e-9)
    # 400 flops at half the peak against 800 bytes in and out.
    assert found["kernel.1"].seconds == pytest.approx(3 * 800e-9)
    # twice 3/4 of 400 bytes, both ways, nothing to hide behind.
    assert found["sum"].seconds == pytest.approx(300e-9)
    assert found["end"].seconds == pytest.approx(7e-9)
    assert sum(c.seconds for c in found.values()) == pytest.approx((3 * 1400 + 307) * 1e-9)


def test_flops_decide_where_they_take_longer_than_bytes():
    assert by_name(charges(PROGRAM, CHIP, {"kernel": 4000}))["kernel.1"].seconds == pytest.approx(3 * 8000e-9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("constant(3)", "parameter(0)", "loop loop of unknown length"),
        ("%kernel.1 = ", "%other = ", "custom call other"),
        ("replica_groups=[4,4]<=[16]", "replica_groups=none", "unknown groups"),
        ("fusion(%sum)", "call(%sum)", "call end"),
    ],
)
def test_what_has_no_price_is_named(old, new, message):
    with pytest.raises(Unpriced, match=message):
        charges(PROGRAM.replace(old, new), CHIP, {"kernel": 1})


def test_bytes_of_types():
    assert num_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(3)}, s8[5], pred[4]{0}, f32[])") == 12 + 5 + 4 + 4
    with pytest.raises(Unpriced, match="type q7"):
        num_bytes("q7[3]")
