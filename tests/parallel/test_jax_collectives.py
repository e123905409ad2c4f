"""Reading what a compiled program sends: each way in which XLA writes it down."""

import pytest

pytest.importorskip("jax")

from perfkit.parallel.jax_collectives import collectives, filled_first, told


def program(*lines: str, others: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step\n\n{others}\nENTRY %main.1 (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "ranks"),
    [
        ("replica_groups={{0,1,2,3}}", 4),
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_the_size_of_a_group(groups, ranks):
    line = f"%r = f32[100]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add"
    (found,) = collectives(program(line), devices=8)
    assert (found.kind, found.bytes, found.ranks, found.times) == ("all-reduce", 400, ranks, 1)
    assert found.sent_bytes == 2 * 400 * (ranks - 1) / ranks


@pytest.mark.parametrize(
    ("line", "bytes_", "sent"),
    [
        ("(f32[4,3]{1,0}, bf16[5]{0}) all-reduce(%a, %b)", 58, 87),
        ("f32[4,3]{1,0} all-reduce-start(%a)", 48, 72),
        ("(f32[1,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%a), dimensions={0}", 128, 96),
        ("f32[2,8]{1,0:T(8,128)} reduce-scatter(%a), dimensions={0}", 64, 192),
        ("s8[16]{0} all-to-all(%a), dimensions={0}", 16, 12),
        ("pred[16]{0} collective-permute(%a), source_target_pairs={{0,1},{1,2}}", 16, 16),
        ("(f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}", 8, 8),
    ],
)
def test_the_bytes_of_each_kind(line, bytes_, sent):
    (found,) = collectives(program(f"ROOT %r.2 = {line}, replica_groups={{{{0,1,2,3}}}}"), devices=4)
    assert (found.bytes, found.sent_bytes) == (bytes_, sent)


def test_what_ends_an_operation_or_only_names_one_is_not_counted():
    lines = (
        "%s = f32[4]{0} all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%add",
        "%all-reduce.7 = f32[4]{0} all-reduce-done(%s)",
        "%g = f32[4]{0} get-tuple-element(%all-reduce.7), index=0",
        "%alone = f32[4]{0} all-gather(%p), replica_groups={{0},{1}}",
    )
    assert told(collectives(program(*lines), 2)) == "1 all-reduce of 16 B"
    assert told(()) == "no collective operation"


LOOP = """%body.1 (t: f32[4]) -> f32[4] {
  %r.1 = f32[250]{0} all-reduce(%t), replica_groups={{0,1}}, to_apply=%add
  %f.1 = f32[4]{0} fusion(%r.1), kind=kLoop, calls=%inner.1
}

%inner.1 (t: f32[4]) -> f32[4] {
  %r.2 = f32[4]{0} all-gather(%t), replica_groups={{0,1}}
}

%unused.1 (t: f32[4]) -> f32[4] {
  %r.3 = f32[4]{0} all-gather(%t), replica_groups={{0,1}}
}
"""


def test_a_loop_sends_in_every_round():
    trips = 'backend_config={"known_trip_count":{"n":"17"}}'
    line = f"%w = f32[4]{{0}} while(%p), condition=%cond.1, body=%body.1, {trips}"
    found = collectives(program(line, others=LOOP), 2)
    assert [(item.kind, item.times, item.looped) for item in found] == [
        ("all-reduce", 17, True),
        ("all-gather", 17, True),
    ]
    assert sum(item.sent_bytes for item in found) == 17 * (1000 + 8)
    assert told(found) == "17 all-reduces (17 in loops) of 17 kB, 17 all-gathers (17 in loops) of 272 B"


def test_a_loop_of_unknown_length_is_said_to_be_one():
    found = collectives(program("%w = f32[4]{0} while(%p), condition=%cond.1, body=%body.1", others=LOOP), 2)
    assert [item.times for item in found] == [None, None]
    assert told(found).endswith("loops of unknown length counted as one round")


FILLED = (
    "%zero = f32[] constant(0)",
    "%zeros = f32[8]{0} fusion(%zero), kind=kLoop, calls=%fill",
    "%two = (f32[8]{0}, s32[4]{0}) fusion(%zeros, %zero), kind=kLoop, calls=%both",
    "%one = f32[8]{0} get-tuple-element(%two), index=0",
    "%read = f32[8]{0} copy(%p)",
    "%mixed = f32[8]{0} add(%one, %read)",
)
GATHER = "%g = f32[4]{0} all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}"
ENDLESS = "%loop = (s32[], f32[8]{0}) while(%t), condition=%c, body=%b"


@pytest.mark.parametrize(
    ("lines", "filled"),
    [
        ((GATHER, *FILLED, ENDLESS), 32 + 48),
        ((*FILLED, GATHER, ENDLESS), 32 + 48),
        ((*FILLED, ENDLESS, GATHER), 0),
        (FILLED, 0),
    ],
)
def test_what_is_filled_while_devices_wait_for_each_other(lines, filled):
    assert filled_first(program(*lines)) == filled
