"""Seeded random inputs: right types and shapes, indices inside their tables."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxshrink.errors import UsageError
from onnxshrink.model import Model, ValueInfo
from onnxshrink.samples import Samples
from onnxshrink.samples.random_inputs import random_shapes
from onnxshrink.testing.decoders import decoder

F32, I64, I32, BOOL = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.BOOL,
)


def whole(samples: Samples, size: int = 4) -> dict[str, np.ndarray]:
    batches = list(samples.batches(size))
    return {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}


def model(text: str) -> Model:
    return Model.load(onnx.parser.parse_model(text))


LINEAR = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
{ y = MatMul(x, w) }
"""


def test_random_token_ids_stay_inside_the_table():
    m = model(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (int64[batch, seq] ids, int64[batch, seq] attention_mask)
          => (float[batch, seq, 2] y)
        <float[5, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[1] minus = {-1}>
        {
          narrow = Cast<to = 6>(ids)
          rows = Gather(table, narrow)
          wide = Unsqueeze(attention_mask, minus)
          keep = Cast<to = 1>(wide)
          y = Mul(rows, keep)
        }
        """
    )
    samples = Samples.random_for(m, seed=3, count=20)
    feeds = list(samples.batches())
    ids = np.stack([f["ids"] for f in feeds])
    assert ids.shape == (20, 2, 16)
    assert set(ids.ravel().tolist()) == {0, 1, 2, 3, 4}
    assert all((f["attention_mask"] == 1).all() for f in feeds)
    assert samples.random
    assert samples.whole


@pytest.mark.parametrize(
    "body",
    [
        "y = OneHot<axis = -1>(ids, depth, values)",
        "wide = Unsqueeze(ids, minus) same = Equal(wide, list) y = Cast<to = 1>(same)",
    ],
)
def test_random_ids_for_one_hot_coding_stay_below_its_depth(body: str):
    m = model(
        f"""
        <ir_version: 10, opset_import: ["" : 17]>
        g (int64[N, 3] ids) => (float[N, 3, 4] y)
        <int64 depth = {{4}}, float[2] values = {{0, 1}}, int64[1] minus = {{-1}},
         int64[4] list = {{0, 1, 2, 3}}>
        {{ {body} }}
        """
    )
    feeds = Samples.random_for(m, count=20).batches()
    ids = np.stack([feed["ids"] for feed in feeds])
    assert set(ids.ravel().tolist()) == {0, 1, 2, 3}


def test_random_inputs_are_the_same_for_the_same_seed_in_any_order():
    one = Samples.random_for(model(LINEAR), seed=1, count=4)
    two = Samples.random_for(model(LINEAR), seed=1, count=4)
    assert np.array_equal(one.read([2])["x"], list(two.batches())[2]["x"])
    other = Samples.random_for(model(LINEAR), seed=2, count=4)
    assert not np.array_equal(one.read([2])["x"], other.read([2])["x"])


def test_shapes_of_random_inputs_can_be_set():
    samples = Samples.random_for(model(LINEAR), shapes={"x": (7, 2)})
    assert samples.read([0])["x"].shape == (7, 2)
    assert "--shape" in samples.hint
    with pytest.raises(UsageError, match="does not fit the input 'x'"):
        Samples.random_for(model(LINEAR), shapes={"x": (7, 3)})
    with pytest.raises(UsageError, match="no input 'xx'"):
        Samples.random_for(model(LINEAR), shapes={"xx": (7, 3)})


def test_equal_symbols_get_equal_sizes_and_sums_add_up():
    m = model(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (float[batch, past] a, float[batch, now] b) => (float[c, d] y)
        { y = Concat<axis = 1>(a, b) }
        """
    )
    m.graph.inputs[1].shape = ["batch", "past + 1"]
    infos = [ValueInfo("a", F32, ("B", "past")), ValueInfo("b", F32, ("B", "past + 1"))]
    from onnxshrink.samples.random_inputs import random_shapes

    assert random_shapes(infos, {"a": (3, 4)}) == {"a": (3, 4), "b": (3, 5)}
    with pytest.raises(UsageError, match="'B' is 3 and 2"):
        random_shapes(infos, {"a": (3, 4), "b": (2, 5)})


def test_random_values_respect_every_type():
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (TYPE[N] x) => (TYPE[N] y) { y = Identity(x) }
    """
    kinds = {}
    for name in ("float", "double", "float16", "uint8", "int64", "bool", "string"):
        samples = Samples.random_for(model(text.replace("TYPE", name)))
        kinds[name] = samples.read([0])["x"]
    assert kinds["float16"].dtype == np.float16
    assert len(np.unique(kinds["float"])) == 2
    assert kinds["bool"].all()
    assert kinds["int64"].tolist() == [1, 1]
    assert all(isinstance(v, str) for v in kinds["string"])


def test_a_mask_covers_the_past_and_the_new_tokens() -> None:
    model = Model.load(decoder(past=True))
    found = random_shapes(model.inputs, {})
    past = found["past_key_values.0.key"][2]
    assert found["attention_mask"][1] == past + found["input_ids"][1]
    found = random_shapes(model.inputs, {"past_key_values.0.key": (2, 2, 5, 16)})
    assert found["attention_mask"][1] == 5 + found["input_ids"][1]
