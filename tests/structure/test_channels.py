"""Which slices of which weights go together, and that removing them is sound."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Splits
from onnxshrink.structure import channels
from onnxshrink.structure.channels import Group
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[2] / "models"
EXAMPLES = example_models()
Array = np.ndarray[Any, Any]


def built(
    text: str, weights: Mapping[str, Sequence[int] | Array], *, opset: int = 17
) -> Model:
    """Return the model of an ONNX text; weights given by shape are seeded random."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
        f"example {text}"
    )
    for name, value in weights.items():
        if not isinstance(value, np.ndarray):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            value = rng.standard_normal(value).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model.load(proto)


def group(model: Model, name: str) -> Group:
    found = {one.name: one for one in channels.find(model)}
    return found[name]


def maker(model: Model, weight: str) -> Group:
    """Return the group of the channels that a weight makes."""
    return next(
        one
        for one in channels.find(model)
        for part in one.where
        if part.weight.name == weight and part.role == "producer"
    )


def run(model: Model, feed: Mapping[str, Array]) -> dict[str, Any]:
    return dict(runtime.session(model, threads=1, optimize="off").run(feed))


def feed_of(model: Model) -> Mapping[str, Array]:
    samples = Splits.build(model, seed=3).calibration
    assert samples is not None
    return next(iter(samples.batches(2)))


def silence(model: Model, one: Group, gone: Sequence[int]) -> None:
    """Zero what reads the channels that will go."""
    for part in one.where:
        if part.role == "consumer":
            values = part.weight.read().copy()
            np.moveaxis(values, part.axis, 0)[part.offsets[list(gone)].ravel()] = 0
            model.set_weight(part.weight.name, values)


def check_removal(model: Model, name: str, gone: Sequence[int]) -> None:
    """Check that channels nobody weighs can go without a change of outputs."""
    feed = feed_of(model)
    copy = model.copy()
    silence(copy, group(copy, name), gone)
    wanted = run(copy, feed)
    one = group(copy, name)
    channels.remove(copy, one, [i for i in range(one.size) if i not in set(gone)])
    copy.check()
    for output, value in run(copy, feed).items():
        assert value.shape == wanted[output].shape
        if not one.inexact:
            np.testing.assert_allclose(value, wanted[output], rtol=1e-4, atol=1e-5)


REMOVABLE = [
    (name, one.name, one.size)
    for name, proto in EXAMPLES.items()
    for one in channels.find(Model.load(proto))
    if not one.why
]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_channels_without_a_consumer_can_go(data: st.DataObject) -> None:
    name, where, size = data.draw(st.sampled_from(REMOVABLE))
    some = st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1)
    gone = sorted(data.draw(some))
    check_removal(Model.load(EXAMPLES[name]), where, gone)


def test_the_examples_have_removable_channels_of_many_kinds() -> None:
    assert len({name for name, _, _ in REMOVABLE}) >= 8


@pytest.mark.parametrize("name", ["lenet-5", "residual-cnn", "vit"])
def test_channels_of_a_trained_model_can_go(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    found = [one for one in channels.find(model) if not one.why]
    assert found
    for one in found[:: max(1, len(found) // 4)]:
        check_removal(model, one.name, range(one.size // 2))


@pytest.mark.parametrize("name", ["lenet-5", "residual-cnn", "vit"])
def test_all_groups_can_be_halved_at_once(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    found = [one for one in channels.find(model) if not one.why]
    channels.remove_all(model, [(one, range(one.size // 2)) for one in found])
    model.check()
    output = run(model, {"image": np.zeros((3, 1, 28, 28), np.float32)})
    assert output["logits"].shape == (3, 10)
    for one in channels.find(model):
        if not one.why:
            before = next(old for old in found if old.name == one.name)
            assert one.size == before.size // 2


def test_flatten_ties_a_channel_to_a_run_of_columns() -> None:
    one = group(Model.load(MODELS / "lenet-5.onnx"), "conv2.weight")
    reader = next(part for part in one.where if part.weight.name == "fc1.weight")
    assert one.size == 50
    assert reader.axis == 1
    assert reader.offsets[3].tolist() == list(range(48, 64))


def test_a_head_is_a_run_of_channels_of_three_projections() -> None:
    model = Model.load(MODELS / "vit.onnx")
    one = group(model, "blocks.0.attention.query.weight")
    assert one.size == 4
    layers = {part.weight.name.split(".")[3] for part in one.where}
    assert layers == {"query", "key", "value", "out"}
    assert all(part.offsets.shape == (4, 16) for part in one.where)


def test_add_ties_branches_and_concat_shifts_them() -> None:
    model = built(
        """(float[N,3] x) => (float[N,2] y) {
            a = MatMul(x, wa)
            b = MatMul(x, wb)
            s = Add(a, b)
            c = MatMul(x, wc)
            d = Concat<axis = 1>(c, s)
            y = MatMul(d, out)
        }""",
        {"wa": (3, 4), "wb": (3, 4), "wc": (3, 5), "out": (9, 2)},
    )
    one, other = maker(model, "wa"), maker(model, "wc")
    found = [(p.weight.name, p.axis, p.offsets.ravel().tolist()) for p in one.where]
    assert ("wb", 1, [0, 1, 2, 3]) in found
    assert ("out", 0, [5, 6, 7, 8]) in found
    assert other.where[-1].offsets.ravel().tolist() == [0, 1, 2, 3, 4]
    check_removal(model, "wa", [1, 2])
    check_removal(model, "wc", [0, 4])


def test_whole_groups_of_a_grouped_convolution_go() -> None:
    model = built(
        """(float[N,2,5,5] x) => (float[N,2,3,3] y) {
            a = Conv(x, first)
            b = Conv<group = 3, pads = [1, 1, 1, 1]>(a, grouped)
            y = Conv(b, last)
        }""",
        {"first": (6, 2, 1, 1), "grouped": (9, 2, 3, 3), "last": (2, 9, 3, 3)},
    )
    one = next(one for one in channels.find(model) if "grouped" in one.names)
    assert one.size == 3
    channels.remove(model, one, [0, 2])
    node = next(node for node in model.graph.nodes if node.attrs.get("group"))
    assert node.attrs["group"] == 2
    assert model.weight("grouped").shape == (6, 2, 3, 3)


@pytest.mark.parametrize(
    ("text", "weights", "opset"),
    [
        ("p, q = Split<axis = 1>(h, sizes)", {"sizes": np.array([4, 4])}, 17),
        ("p, q = Split<axis = 1>(h)", {}, 17),
        ("p, q = Split<axis = 1, split = [4, 4]>(h)", {}, 12),
        ("p, q = Split<axis = 1, num_outputs = 2>(h)", {}, 18),
    ],
)
def test_split_gets_the_sizes_that_are_left(
    text: str, weights: Mapping[str, Array], opset: int
) -> None:
    model = built(
        f"""(float[N,3] x) => (float[N,2] y) {{
            h = MatMul(x, w)
            {text}
            r = Relu(p)
            a = MatMul(r, one)
            b = MatMul(q, two)
            y = Add(a, b)
        }}""",
        {"w": (3, 8), "one": (4, 2), "two": (4, 2), **weights},
        opset=opset,
    )
    found = [one for one in channels.find(model) if not one.why]
    assert [one.size for one in found] == [4, 4]
    check_removal(model, found[0].name, [0, 3])
    check_removal(model, found[1].name, [2])


def test_a_reshape_whose_sizes_are_computed_gets_new_ones() -> None:
    model = built(
        """(float[N,S,6] x) => (float[N,S,6] y) {
            h = MatMul(x, w)
            shape = Shape(x)
            batch = Gather(shape, places)
            wanted = Concat<axis = 0>(batch, heads, each)
            r = Reshape(h, wanted)
            t = Transpose<perm = [0, 2, 1, 3]>(r)
            u = Relu(t)
            v = Transpose<perm = [0, 2, 1, 3]>(u)
            back = Concat<axis = 0>(batch, all)
            f = Reshape(v, back)
            y = MatMul(f, out)
        }""",
        {
            "w": (6, 12),
            "out": (12, 6),
            "places": np.array([0, 1]),
            "heads": np.array([3]),
            "each": np.array([4]),
            "all": np.array([12]),
        },
    )
    assert maker(model, "w").size == 3
    check_removal(model, "w", [1])


def test_a_reshape_of_single_entries_gets_new_ones() -> None:
    model = built(
        """(float[N,S,6] x) => (float[N,S,6] y) {
            h = MatMul(x, w)
            shape = Shape(x)
            n = Gather(shape, zero)
            s = Gather(shape, one)
            wanted = Concat<axis = 0>(n, s, heads, each)
            r = Reshape(h, wanted)
            u = Relu(r)
            back = Concat<axis = 0>(n, s, all)
            f = Reshape(u, back)
            y = MatMul(f, out)
        }""",
        {
            "w": (6, 12),
            "out": (12, 6),
            "zero": np.array([0]),
            "one": np.array([1]),
            "heads": np.array([3]),
            "each": np.array([4]),
            "all": np.array([12]),
        },
    )
    assert maker(model, "w").size == 3
    check_removal(model, "w", [1])


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ("b = Softmax<axis = 1>(a)", "Softmax divides by the sum along it"),
        ("b = CumSum(a, axis)", "CumSum"),
        ("b = Slice(a, axis, ends, axis, two)", "Slice takes a part of it"),
    ],
)
def test_an_operator_that_mixes_channels_fixes_them(node: str, why: str) -> None:
    model = built(
        f"""(float[N,3] x) => (float[N,2] y) {{
            a = MatMul(x, w)
            {node}
            y = MatMul(b, out)
        }}""",
        {
            "w": (3, 9 if "Slice" in node else 4),
            "out": (4, 2),
            "axis": np.array([1]),
            "two": np.array([2]),
            "ends": np.array([9]),
        },
    )
    assert why in maker(model, "w").why


def test_an_operator_of_another_domain_is_not_known() -> None:
    model = built(
        """(float[N,3] x) => (float[N,2] y) <float[N,4] b> {
            a = MatMul(x, w)
            b = com.microsoft.Inverse(a)
            y = MatMul(b, out)
        }""",
        {"w": (3, 4), "out": (4, 2)},
    )
    assert "Inverse (b) reads or makes it" in maker(model, "w").why


def test_a_setting_that_a_caller_may_override_is_not_known() -> None:
    model = built(
        """(float[N,3] x, int64[2] wanted) => (float[N,2] y) {
            a = MatMul(x, w)
            b = Expand(a, wanted)
            y = MatMul(b, out)
        }""",
        {"w": (3, 4), "out": (4, 2), "wanted": np.array([1, 1])},
    )
    assert "Expand (b)" in maker(model, "w").why


def test_a_size_that_is_not_known_fixes_what_it_is_added_to() -> None:
    """At run time C is 1 or 4."""
    model = built(
        """(float[N,3] x, float[N,C] u) => (float[N,2] y) {
            a = MatMul(x, w)
            b = Add(a, u)
            y = MatMul(b, out)
        }""",
        {"w": (3, 4), "out": (4, 2)},
    )
    assert "not known to be equal" in maker(model, "w").why


@pytest.mark.parametrize(
    "made",
    [
        "other = Constant<value = float[4,2] {1, 2, 3, 4, 5, 6, 7, 8}>()",
        "other = Identity(out)",
    ],
)
def test_a_weight_behind_a_node_is_cut_where_it_is(made: str) -> None:
    model = built(
        f"""(float[N,3] x) => (float[N,2] y, float[N,2] z) {{
            {made}
            a = MatMul(x, w)
            b = Relu(a)
            y = MatMul(a, other)
            z = MatMul(b, other)
        }}""",
        {"w": (3, 4), "out": (4, 2)} if "out" in made else {"w": (3, 4)},
    )
    one = maker(model, "w")
    assert one.size == 4
    check_removal(model, one.name, [0, 2])


def test_of_axes_that_are_split_apart_one_is_free() -> None:
    model = built(
        """(float[N,6] x) => (float[N,3,5] y) {
            h = MatMul(x, w)
            r = Reshape(h, apart)
            y = MatMul(r, out)
        }""",
        {"w": (6, 12), "out": (4, 5), "apart": np.array([0, 3, 4])},
    )
    one = maker(model, "w")
    assert one.size == 4  # 3 is an axis of the output
    check_removal(model, one.name, [1])
    model = built(
        """(float[N,6] x) => (float[N,2,5] y) {
            h = MatMul(x, w)
            r = Reshape(h, apart)
            s = MatMul(r, inner)
            y = MatMul(outer, s)
        }""",
        {
            "w": (6, 12),
            "inner": (4, 5),
            "outer": (2, 3),
            "apart": np.array([0, 3, 4]),
        },
    )
    one = maker(model, "w")
    assert one.size == 3
    whys = [one.why for one in channels.find(model) if one.size == 4]
    assert whys == ["Reshape merges or splits it with another axis, at Reshape (r)"]
    check_removal(model, one.name, [1])


def test_codes_of_a_table_are_cut_and_are_no_weights() -> None:
    model = built(
        """(int64[N] ids) => (float[N,2] y) {
            t = Gather(table, ids)
            a = Cast<to = 1>(t)
            b = Mul(a, scale)
            y = MatMul(b, out)
        }""",
        {
            "table": np.arange(20, dtype=np.int8).reshape(5, 4),
            "scale": (4,),
            "out": (4, 2),
        },
    )
    (one,) = [one for one in channels.find(model) if not one.why]
    assert [part.weight.name for part in one.where] == ["scale", "out"]
    check_removal(model, one.name, [1])


def test_what_a_branch_reads_is_fixed() -> None:
    model = built(
        """(float[N,3] x, bool go) => (float[N,2] y) {
            a = MatMul(x, w)
            y = If(go) <
                then_branch = yes () => (float[N,2] p) { p = MatMul(a, out) },
                else_branch = no () => (float[N,2] q) { q = MatMul(a, out) }
            >
        }""",
        {"w": (3, 4), "out": (4, 2)},
    )
    assert "a branch or body of If" in maker(model, "w").why


def test_a_size_that_the_graph_reads_off_is_fixed() -> None:
    model = built(
        """(float[N,3] x) => (float[N,2] y, int64[1] size) {
            a = MatMul(x, w)
            shape = Shape(a)
            size = Gather(shape, one)
            y = MatMul(a, out)
        }""",
        {"w": (3, 4), "out": (4, 2), "one": np.array([1])},
    )
    assert "reads off its size" in maker(model, "w").why


def test_sizes_that_the_graph_reads_off_backwards_are_fixed() -> None:
    """From entry 1 down to the first: the batch, and the number of channels."""
    model = built(
        """(float[N,2,3,3] x) => (float[N,2] y, int64[2] sizes) {
            c = Conv(x, w)
            shape = Shape(c)
            sizes = Slice(shape, one, far, zero, back)
            f = Flatten(c)
            y = MatMul(f, out)
        }""",
        {
            "w": (4, 2, 1, 1),
            "out": (36, 2),
            "one": np.array([1]),
            "far": np.array([-(2**62)]),
            "zero": np.array([0]),
            "back": np.array([-1]),
        },
    )
    assert "reads off its size" in maker(model, "w").why


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        ("b = Resize(a, , , sizes)", 17),
        ("b = Resize<axes = [-3, 2, 3]>(a, , , three)", 18),
        ("b = Resize<axes = [2, 3]>(a, , , two)", 18),
        ("b = Resize<axes = [2, 3]>(a, , double)", 18),
        ("b = Resize(a, , scales)", 17),
    ],
)
def test_a_resize_states_new_sizes_where_channels_go(node: str, opset: int) -> None:
    model = built(
        f"""(float[1,2,3,3] x) => (float[1,2,6,6] y) {{
            a = Conv(x, w)
            {node}
            y = Conv(b, out)
        }}""",
        {
            "w": (4, 2, 1, 1),
            "out": (2, 4, 1, 1),
            "sizes": np.array([1, 4, 6, 6]),
            "three": np.array([4, 6, 6]),
            "two": np.array([6, 6]),
            "double": np.array([2, 2], np.float32),
            "scales": np.array([1, 1, 2, 2], np.float32),
        },
        opset=opset,
    )
    one = maker(model, "w")
    assert not one.why
    check_removal(model, one.name, [1])


def test_a_channel_that_a_norm_sees_is_inexact() -> None:
    model = Model.load(MODELS / "vit.onnx")
    assert "LayerNormalization" in group(model, "patch.weight").inexact
    assert not group(model, "blocks.0.fc1.weight").inexact


def test_a_fixed_group_is_refused() -> None:
    model = Model.load(MODELS / "lenet-300-100.onnx")
    with pytest.raises(UsageError, match="'logits' is an output of the model"):
        channels.remove(model, group(model, "fc3.weight"), [0])


@pytest.mark.parametrize("keep", [[], [300], [-1]])
def test_something_that_exists_must_stay(keep: list[int]) -> None:
    model = Model.load(MODELS / "lenet-300-100.onnx")
    with pytest.raises(UsageError, match="keep some of the 300"):
        channels.remove(model, group(model, "fc1.weight"), keep)


def test_a_group_of_another_model_is_refused() -> None:
    model = Model.load(MODELS / "lenet-300-100.onnx")
    with pytest.raises(UsageError, match="another model"):
        channels.remove(model.copy(), group(model, "fc1.weight"), [0])


def test_groups_have_names_of_their_own() -> None:
    for proto in EXAMPLES.values():
        names = [one.name for one in channels.find(Model.load(proto))]
        assert len(set(names)) == len(names)


def test_heads_of_query_key_and_value_in_one_weight_are_groups() -> None:
    """The axis of three is picked apart by number; that of heads is free."""
    model = built(
        """(float[N,S,4] x) => (float[N,S,4] y) {
            h = MatMul(x, qkv)
            r = Reshape(h, apart)
            t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
            q = Gather<axis = 0>(t, zero)
            k = Gather<axis = 0>(t, one)
            v = Gather<axis = 0>(t, two)
            kt = Transpose<perm = [0, 1, 3, 2]>(k)
            scores = MatMul(q, kt)
            p = Softmax<axis = -1>(scores)
            o = MatMul(p, v)
            b = Transpose<perm = [0, 2, 1, 3]>(o)
            m = Reshape(b, merged)
            y = MatMul(m, out)
        }""",
        {
            "qkv": (4, 24),
            "out": (8, 4),
            "apart": np.array([0, 0, 3, 4, 2]),
            "merged": np.array([0, 0, 8]),
            **{name: np.array(at) for at, name in enumerate(["zero", "one", "two"])},
        },
    )
    one = maker(model, "qkv")
    assert one.size == 4
    assert one.where[0].offsets[1].tolist() == [2, 3, 10, 11, 18, 19]
    check_removal(model, one.name, [0, 2])


def test_channels_last_are_followed_through_flatten() -> None:
    model = built(
        """(float[N,2,3,3] x) => (float[N,2] y) {
            c = Conv(x, w)
            t = Transpose<perm = [0, 2, 3, 1]>(c)
            f = Flatten(t)
            y = MatMul(f, out)
        }""",
        {"w": (4, 2, 1, 1), "out": (36, 2)},
    )
    one = next(one for one in channels.find(model) if not one.why)
    assert one.where[-1].offsets[1].tolist() == list(range(1, 36, 4))
    check_removal(model, one.name, [1, 3])


@pytest.mark.parametrize(
    "picks",
    [
        "s = Shape(c) n = Gather(s, first)",
        "s = Shape(c) n = Slice(s, start, end)",
        "s = Shape(c) n = Slice(s, start, four, start, four)",
        "n = Shape<start = 0, end = 1>(c)",
        "s = Shape(c) at = Constant<value_ints = [0]>() n = Gather(s, at)",
    ],
)
def test_a_flatten_that_computes_the_batch_leaves_channels_free(picks: str) -> None:
    model = built(
        f"""(float[N,2,3,3] x) => (float[N,2] y) {{
            c = Conv(x, w)
            {picks}
            wanted = Concat<axis = 0>(n, rest)
            f = Reshape(c, wanted)
            y = MatMul(f, out)
        }}""",
        {
            "w": (4, 2, 1, 1),
            "out": (36, 2),
            "first": np.array([0]),
            "start": np.array([0]),
            "end": np.array([1]),
            "four": np.array([4]),
            "rest": np.array([-1]),
        },
    )
    one = next(one for one in channels.find(model) if not one.why)
    assert one.size == 4
    check_removal(model, one.name, [1])


def test_a_class_token_follows_the_channels_of_the_others() -> None:
    model = built(
        """(float[N,S,3] x) => (float[N,2] y) {
            h = MatMul(x, w)
            s = Shape(x)
            n = Gather(s, first)
            wanted = Concat<axis = 0>(n, one, one)
            t = Expand(token, wanted)
            c = Concat<axis = 1>(t, h)
            p = Gather<axis = 1>(c, zero)
            y = MatMul(p, out)
        }""",
        {
            "w": (3, 6),
            "token": (1, 1, 6),
            "out": (6, 2),
            "first": np.array([0]),
            "one": np.array([1]),
            "zero": np.array(0),
        },
    )
    one = maker(model, "w")
    assert one.size == 6
    assert not one.why
    check_removal(model, one.name, [1, 4])
    keep = [i for i in range(6) if i not in (1, 4)]
    channels.remove(model, one, keep)
    assert model.weight("token").shape == (1, 1, 4)


def check_every_group(model: Model, least: int = 1) -> list[Group]:
    """Remove a channel of every group that is free; return the groups."""
    free = [one for one in channels.find(model) if not one.why]
    assert len(free) >= least, [one.why for one in channels.find(model)]
    for one in free:
        check_removal(model, one.name, [one.size - 1])
        if one.size > 2:
            check_removal(model, one.name, [0, 1])
    return free


def test_a_value_that_is_joined_twice_goes_twice() -> None:
    model = built(
        """(float[N,3] x) => (float[N,2] y) {
            a = MatMul(x, wa)
            b = MatMul(x, wb)
            c = Concat<axis = 1>(a, b, a)
            y = MatMul(c, out)
        }""",
        {"wa": (3, 4), "wb": (3, 5), "out": (13, 2)},
    )
    assert [one.size for one in check_every_group(model)] == [4, 5]
    both = [(one, [1, 2]) for one in channels.find(model) if not one.why]
    channels.remove_all(model, both)
    model.check()
    assert model.weight("out").shape == (2 * 2 + 2, 2)


def test_features_of_two_resolutions_meet_on_one_axis() -> None:
    model = built(
        """(float[N,3,4,4] x) => (float[N,2] y) {
            a = Conv(x, wa)
            b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
            c = Conv(x, wc)
            d = GlobalAveragePool(c)
            e = Flatten(b)
            f = Flatten(d)
            g = Concat<axis = 1>(e, f)
            y = MatMul(g, out)
        }""",
        {"wa": (4, 3, 1, 1), "wc": (6, 3, 1, 1), "out": (22, 2)},
    )
    check_every_group(model, 2)
    channels.remove_all(
        model, [(one, [0, 3]) for one in channels.find(model) if not one.why]
    )
    model.check()
    assert model.weight("out").shape == (2 * 4 + 2, 2)


@pytest.mark.parametrize("shuffled", [False, True])
def test_channels_behind_a_shuffle_can_go(shuffled: bool) -> None:
    shuffle = """
            s = Reshape(b, split)
            t = Transpose<perm = [0, 2, 1, 3, 4]>(s)
            c = Reshape(t, whole)"""
    model = built(
        f"""(float[2,4,5,5] x) => (float[2,2,5,5] y) {{
            a = Conv(x, first)
            r = Relu(a)
            b = Conv<group = 2, pads = [1, 1, 1, 1]>(r, one)
            {shuffle if shuffled else "c = Identity(b)"}
            d = Conv<group = 2>(c, two)
            y = Conv(d, last)
        }}""",
        {
            "first": (8, 4, 1, 1),
            "one": (8, 4, 3, 3),
            "two": (8, 4, 1, 1),
            "last": (2, 8, 1, 1),
            "split": np.array([2, 2, 4, 5, 5]),
            "whole": np.array([2, 8, 5, 5]),
        },
    )
    found = check_every_group(model, 3 if shuffled else 1)
    if shuffled:
        sizes = {one.name: one.size for one in found}
        # Channel 3 of one group is channel 3 of the other, before and behind it.
        assert sizes == {"first[0]": 4, "one": 2, "two": 4}


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
def test_hidden_units_go_with_all_their_gates(op: str, directions: int) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    direction = "bidirectional" if directions == 2 else "forward"
    model = built(
        f"""(float[5,2,3] x) => (float[5,2,2] y) {{
            e = MatMul(x, into)
            h = {op}<hidden_size = 4, direction = "{direction}">(e, w, r, b)
            t = Transpose<perm = [0, 2, 1, 3]>(h)
            f = Reshape(t, flat)
            y = MatMul(f, out)
        }}""",
        {
            "into": (3, 6),
            "w": (directions, gates * 4, 6),
            "r": (directions, gates * 4, 4),
            "b": (directions, gates * 8),
            "flat": np.array([5, 2, directions * 4]),
            "out": (directions * 4, 2),
        },
    )
    found = check_every_group(model, 2)
    units = next(one for one in found if "r" in one.names)
    assert units.size == 4
    channels.remove(model, units, [0, 2, 3])
    assert model.weight("r").shape == (directions, gates * 3, 3)
    assert model.graph.nodes[1].attrs["hidden_size"] == 3


def test_whole_groups_of_a_norm_go() -> None:
    model = built(
        """(float[N,3,4,4] x) => (float[N,2,4,4] y) {
            a = Conv(x, w)
            b = GroupNormalization<num_groups = 3>(a, scale, shift)
            y = Conv(b, out)
        }""",
        {"w": (6, 3, 1, 1), "scale": (6,), "shift": (6,), "out": (2, 6, 1, 1)},
        opset=21,
    )
    (one,) = check_every_group(model)
    assert one.size == 3
    channels.remove(model, one, [1])
    assert model.graph.nodes[1].attrs["num_groups"] == 1


def test_a_norm_over_neighbours_is_inexact() -> None:
    model = built(
        """(float[N,3,4,4] x) => (float[N,2,4,4] y) {
            a = Conv(x, w)
            b = LRN<size = 3>(a)
            y = Conv(b, out)
        }""",
        {"w": (6, 3, 1, 1), "out": (2, 6, 1, 1)},
    )
    (one,) = check_every_group(model)
    assert "neighbours" in one.inexact


def test_an_output_that_nobody_reads_fixes_nothing() -> None:
    model = built(
        """(float[N,3,4,4] x) => (float[N,2,4,4] y) {
            a = Conv(x, w)
            b, mask = Dropout(a)
            y = Conv(b, out)
        }""",
        {"w": (6, 3, 1, 1), "out": (2, 6, 1, 1)},
    )
    check_every_group(model)


def test_parts_that_slices_take_follow_the_whole() -> None:
    model = built(
        """(float[N,3] x) => (float[N,2] y) {
            h = MatMul(x, w)
            p = Slice(h, zero, four, one)
            q = Slice(h, four, end, one)
            a = MatMul(p, left)
            b = MatMul(q, right)
            y = Add(a, b)
        }""",
        {
            "w": (3, 10),
            "left": (4, 2),
            "right": (6, 2),
            "zero": np.array([0]),
            "four": np.array([4]),
            "one": np.array([1]),
            "end": np.array([2**62]),
        },
    )
    assert [one.size for one in check_every_group(model)] == [4, 6]
    channels.remove_all(
        model, [(one, [1, 3]) for one in channels.find(model) if not one.why]
    )
    model.check()
    assert run(model, feed_of(model))["y"].shape[1] == 2
