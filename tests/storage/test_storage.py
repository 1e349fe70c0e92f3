"""Storage: every encoding is exact in onnxruntime, folds away, and is taken back."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.model.encodings import DecodedTensor, decode, recognise
from onnxshrink.storage import Encoder, Encoding
from onnxshrink.storage.census import Census, Codes, vector_table
from onnxshrink.storage.packing import PACKINGS, PLANES, tightest
from onnxshrink.tensors import ArrayTensor, LazyTensor

Array = np.ndarray[Any, Any]
LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
DTYPES = ["f4", "f2", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?"]


def encoder(opset: int = 17, **options: Any) -> Encoder:
    return Encoder(opset=opset, fresh=lambda name: name, **options)


def encode(array: Array, opset: int = 17, min_bytes: int = 1) -> Encoding | None:
    return encoder(opset, min_bytes=min_bytes).encode("W", ArrayTensor(array))


def model_of(encoding: Encoding, array: Array, opset: int) -> onnx.ModelProto:
    """Return a model whose only output is the decoded weight."""
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    graph = helper.make_graph(
        [*encoding.nodes, helper.make_node("Identity", ["W"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", data_type, array.shape)],
        list(encoding.initializers),
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, level: str, optimized: Path | None = None) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {})[0])


def assert_same_bits(found: Array, array: Array) -> None:
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


def assert_exact(encoding: Encoding, array: Array, opset: int = 17) -> None:
    model = model_of(encoding, array, opset)
    for level in LEVELS:
        assert_same_bits(run(model, level), array)
    assert_same_bits(decode(encoding.nodes, encoding.initializers).read(), array)


def sparse(
    shape: tuple[int, ...], zeros: float, codes: int = 0, dtype: str = "f4"
) -> Array:
    """Return random values, of so many distinct ones besides zero."""
    draw = np.random.default_rng(0)
    values = draw.standard_normal(shape) * 40
    if codes:
        values = draw.permutation(np.arange(1, codes + 1) * 0.7).astype(dtype)[
            draw.integers(0, codes, shape)
        ]
    return np.where(draw.random(shape) < zeros, 0, values).astype(dtype)


def halves(shape: tuple[int, ...]) -> Array:
    draw = np.random.default_rng(1)
    return draw.standard_normal(shape).astype(np.float16).astype(np.float32)


def vectors(count: int, dim: int, size: int) -> Array:
    """Return ``size`` vectors out of ``count``, one behind the other."""
    draw = np.random.default_rng(2)
    table = draw.standard_normal((count, dim)).astype(np.float32)
    return table[draw.integers(0, count, size)].reshape(16, -1)


def parts(count: int, split: tuple[int, int, int], shape: tuple[int, ...]) -> Array:
    """Return a tensor whose parts along the middle axis have values of their own."""
    draw = np.random.default_rng(3)
    tables = draw.standard_normal((split[1], count)).astype(np.float32)
    codes = draw.integers(0, count, split)
    rows = np.arange(split[1])[None, :, None]
    return tables[rows, codes].reshape(shape)


FORMS = {
    "fill": np.full((40, 50), 1.5, np.float32),
    "codes2": sparse((64, 80), 0.5, 1),
    "codes3": sparse((64, 80), 0.4, 2),
    "codes4": sparse((64, 80), 0, 4),
    "codes5": sparse((64, 80), 0, 5),
    "codes6": sparse((64, 80), 0, 6),
    "codes7": sparse((64, 80), 0, 7),
    "codes9": sparse((64, 80), 0, 9),
    "codes10": sparse((64, 80), 0, 10),
    "codes16": sparse((64, 80), 0, 16),
    "codes21": sparse((64, 80), 0, 20),
    "codes40": sparse((64, 80), 0, 33),
    "codes73": sparse((64, 80), 0, 70),
    "codes256": sparse((64, 80), 0, 256),
    "codes8": sparse((300, 400), 0, 8),
    "codes32": sparse((300, 400), 0, 30),
    "codes64": sparse((300, 400), 0, 64),
    "vectors2x64": vectors(50, 2, 120_000),
    "vectors4x256": vectors(256, 4, 8_000),
    "vectors4x21": vectors(17, 4, 8_000),
    "vectors8x16": vectors(16, 8, 80_000),
    "parts32x16": parts(16, (1, 32, 6000), (32, 150, 40)),
    "parts24x4": parts(4, (500, 24, 1), (500, 24)),
    "parts8x8": parts(8, (300, 8, 100), (300, 800)),
    "parts20x8": parts(8, (1, 20, 4096), (80, 1024)),
    "float16": halves((64, 80)),
    "bfloat16": (sparse((64, 80), 0) * np.float32(1e9))
    .astype(ml_dtypes.bfloat16)
    .astype(np.float32),
    "int8": sparse((9, 30), 0, dtype="f8").clip(-128, 127).round().astype(np.float32)
    + np.float32(0),
    "mask+raw": sparse((64, 80), 0.4),
    "mask+float16": np.where(sparse((64, 80), 0.4) == 0, 0, halves((64, 80))),
    "mask+codes16": sparse((300, 400), 0.4, 16),
    "mask+codes4": sparse((300, 400), 0.55, 4),
    "skips4+codes16": sparse((300, 400), 0.7, 16),
    "skips16+raw": sparse((300, 400), 0.9),
    "skips16+codes16": sparse((300, 400), 0.9, 16),
    "skips40+codes16": sparse((300, 400), 0.95, 16),
    "gaps16+raw": sparse((37, 53), 0.75),
    "gaps256+raw": sparse((64, 80), 0.97),
    "gaps256+codes16": sparse((64, 80), 0.97, 16),
    "gaps21+codes21": sparse((64, 80), 0.9, 17),
}


@pytest.mark.parametrize("kind", FORMS)
def test_form_is_exact_and_folds_to_nothing(tmp_path: Path, kind: str):
    array = FORMS[kind]
    encoding = encode(array)
    assert encoding is not None
    assert encoding.kind == kind
    assert_exact(encoding, array)
    model = model_of(encoding, array, 17)
    for level in ("basic", "all"):
        run(model, level, tmp_path / "folded.onnx")
        folded = onnx.load(tmp_path / "folded.onnx").graph
        assert {node.op_type for node in folded.node} <= {"Identity"}


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_table_and_division_unpack_every_packing(packing: Any):
    # Above 65,536 elements a table unpacks, below a division.
    for size in (997, 70_001):
        codes = packing.base
        array = sparse((size,), 0, codes)
        encoding = encode(array)
        assert encoding is not None
        assert encoding.kind == f"codes{tightest(codes, 17).base}"
        assert_exact(encoding, array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("opset", [7, 10, 11, 21])
def test_every_type_is_exact_at_every_opset(dtype: str, zeros: float, opset: int):
    for codes in (0, 5, 16):
        array = sparse((53, 61), zeros, codes, dtype)
        encoding = encode(array, opset)
        if encoding is not None:
            assert_exact(encoding, array, opset)
        else:
            assert codes == 0 or dtype[1:] == "1", "few values are worth encoding"


SPECIAL = np.array(
    [0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC01234, 0x7FA00001,
     0xFFFFFFFF, 0x00000001, 0x807FFFFF, 0x3F800000],
    np.uint32,
).view(np.float32)  # fmt: skip


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("plenty", [False, True])
def test_signed_zeros_nans_infinities_and_subnormals_keep_their_bits(
    zeros: float, plenty: bool
):
    draw = np.random.default_rng(0)
    array = draw.choice(SPECIAL, (50, 60))
    if plenty:
        array[::2] = draw.standard_normal((25, 60))
    array[draw.random(array.shape) < zeros] = 0
    encoding = encode(array)
    assert (encoding is not None) == (zeros > 0 or not plenty)
    if encoding is not None:
        assert_exact(encoding, array)


def test_half_precision_subnormals_and_infinities_survive_the_cast():
    patterns = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    array = patterns[~np.isnan(patterns)].astype(np.float32)
    encoding = encode(array)
    assert encoding is not None
    assert encoding.kind == "float16"
    assert_exact(encoding, array)


def test_bfloat16_subnormals_survive_the_cast():
    patterns = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    array = patterns.astype(np.float32)
    array = array[~np.isnan(array)]
    encoding = encode(array)
    assert encoding is not None
    assert encoding.kind == "bfloat16"
    assert_exact(encoding, array)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Draw arrays of all types, sparsities, code counts, shapes and odd floats."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(
        st.one_of(
            st.just(()),
            st.lists(st.integers(0, 3), max_size=4).map(tuple),
            st.tuples(st.integers(1, 3000)),
            st.tuples(st.integers(1, 60), st.integers(1, 60)),
            st.tuples(st.just(2), st.just(3), st.integers(1, 40), st.integers(1, 9)),
        )
    )
    size = math.prod(shape)
    source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = source.integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
    values = (raw % 2).view(bool) if dtype.kind == "b" else raw.view(dtype)
    mode = draw(st.sampled_from(["bits", "normal", "small", "codes", "codes", "codes"]))
    if mode == "normal" and dtype.kind != "b":
        values = (source.standard_normal(size) * 30).astype(dtype)
    if mode == "small":
        values = source.integers(0, 3, size).astype(dtype)
    if mode == "codes" and size:
        book = values[: draw(st.integers(1, 300))]
        values = book[source.integers(0, book.size, size)]
    zeros = draw(st.sampled_from([0, 0, 0.3, 0.5, 0.75, 0.9, 0.97, 0.999, 1.0]))
    pattern = draw(st.sampled_from(["random", "tail", "head", "blocks"]))
    places = np.arange(size)
    gone = {
        "random": source.random(size) < zeros,
        "tail": places >= size * (1 - zeros),
        "head": places < size * zeros,
        "blocks": places % 64 < 64 * zeros,
    }[pattern]
    default = draw(st.sampled_from([0, 0, 1]))
    values = np.where(gone, np.array(default, dtype), values)
    return values.astype(dtype).reshape(shape)


@given(arrays(), st.sampled_from([7, 10, 11, 13, 17, 21]), st.sampled_from([1, 256]))
@example(np.zeros((), np.float32), 17, 1)
@example(np.zeros((0, 3), np.float32), 17, 1)
@example(np.full((1,), -0.0, np.float32), 17, 1)
@example(np.repeat(np.float32([0, 1, 0]), [300, 1, 1]), 17, 1)
@example(np.repeat(np.float32([1, 0, 1]), [1, 90_000, 1]), 17, 1)
def test_whatever_the_values_decoding_gives_the_same_bits(
    array: Array, opset: int, min_bytes: int
):
    encoding = encode(array, opset, min_bytes)
    if encoding is None:
        return
    assert_exact(encoding, array, opset)
    written = [*encoding.nodes, *encoding.initializers]
    graph = onnx.GraphProto(node=encoding.nodes, initializer=encoding.initializers)
    plain = onnx.GraphProto(initializer=[numpy_helper.from_array(array, "W")])
    assert written
    assert encoding.nbytes == graph.ByteSize()
    assert encoding.plain_nbytes == plain.ByteSize()
    assert encoding.nbytes < encoding.plain_nbytes


def test_gaps_longer_than_a_digit_are_bridged():
    array = np.zeros(5000, np.float32)
    array[[0, 1, 16, 17, 272, 273, 529, 530, 785, 4999]] = np.arange(1, 11) / 3
    for extra in range(3):
        encoding = encode(array[extra:])
        assert encoding is not None
        assert_exact(encoding, array[extra:])


def test_the_commonest_value_need_not_be_zero():
    array = np.where(sparse((100, 120), 0.9) == 0, -7, sparse((100, 120), 0, 20))
    array = array.astype(np.float32)
    encoding = encode(array)
    assert encoding is not None
    assert encoding.kind.startswith(("skips", "gaps"))
    assert_exact(encoding, array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10, dtype=np.int64),
        np.zeros((0, 500), np.float32),
        np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32),
        np.array([b"text"] * 1000, object),
        np.zeros(1000, ml_dtypes.bfloat16),
        np.zeros(1000, ml_dtypes.int4),
        np.zeros(1000, ml_dtypes.float8_e4m3fn),
        np.zeros(1000, np.complex64),
    ],
    ids=["small", "empty", "dense", "string", "bfloat16", "int4", "float8", "complex"],
)
def test_what_does_not_pay_or_has_no_kernels_stays_plain(array: Array):
    kind = TensorProto.STRING if array.dtype == object else None
    assert encoder().encode("W", ArrayTensor(array, kind)) is None


def test_below_opset_7_and_for_names_of_decoders_all_stays_plain():
    tensor = ArrayTensor(sparse((64, 80), 0.9))
    assert encoder(6).encode("W", tensor) is None
    assert encoder().encode("~w", tensor) is None


def test_decode_memory_can_be_limited():
    array = sparse((2400, 2401), 0.5, 16)
    free = encoder().encode("W", ArrayTensor(array))
    bound = encoder(max_decode_ratio=5).encode("W", ArrayTensor(array))
    assert free is not None
    assert free.kind == "mask+codes16"
    assert bound is not None
    assert bound.kind == "codes21"
    assert bound.decode_nbytes <= 5 * array.nbytes < free.decode_nbytes
    assert encoder(max_decode_ratio=0).encode("W", ArrayTensor(array)) is None


def test_of_nearly_equal_forms_the_one_that_decodes_in_less_memory_wins():
    small = encode(sparse((300, 400), 0.75))
    large = encode(sparse((1600, 1600), 0.75))
    assert small is not None
    assert large is not None
    assert (small.kind, large.kind) == ("skips4+raw", "mask+raw")


def test_weights_of_one_graph_share_tables():
    shared = encoder()
    first = shared.encode("A", ArrayTensor(sparse((300, 400), 0.5, 16)))
    second = shared.encode("B", ArrayTensor(sparse((400, 300), 0.5, 16)))
    assert first is not None
    assert second is not None
    assert len(second.nodes) < len(first.nodes)
    assert second.nbytes < first.nbytes - 200
    names = [t.name for e in (first, second) for t in e.initializers]
    assert len(set(names)) == len(names)
    nodes, tensors = (
        [*first.nodes, *second.nodes],
        [*first.initializers, *second.initializers],
    )
    assert_same_bits(decode(nodes, tensors).read(), sparse((400, 300), 0.5, 16))


def test_names_that_are_taken_are_avoided():
    taken = {f"~{digit}" for digit in "0123456789ab"}

    def fresh(name: str) -> str:
        name = name if name not in taken else name + "_1"
        taken.add(name)
        return name

    before = set(taken)
    array = sparse((300, 400), 0.9, 16)
    encoding = Encoder(opset=17, fresh=fresh).encode("W", ArrayTensor(array))
    assert encoding is not None
    made = {t.name for t in encoding.initializers}
    made |= {node.output[0] for node in encoding.nodes}
    assert not made & before
    assert_exact(encoding, array)


def test_encoding_depends_on_the_values_alone_not_on_chunks():
    class Slow(LazyTensor):
        def __init__(self, array: Array) -> None:
            super().__init__(array.shape, helper.np_dtype_to_tensor_dtype(array.dtype))
            self.array = array

        def read(self) -> Array:
            return self.array

        def chunks(self, nbytes: int = 0) -> Any:
            yield from np.array_split(self.array.reshape(-1), 7)

    for zeros, codes in [(0.9, 16), (0.5, 0), (0, 200), (0, 0)]:
        array = sparse((61, 67), zeros, codes)
        slow = Slow(array)
        whole = encoder().encode("W", ArrayTensor(array))
        limit = pytest.MonkeyPatch()
        limit.setattr("onnxshrink.storage.census._HELD", 0)
        pieces = encoder().encode("W", slow)
        limit.undo()
        assert (whole is None) == (pieces is None)
        if whole is not None and pieces is not None:
            assert whole.nodes == pieces.nodes
            assert whole.initializers == pieces.initializers


@given(st.integers(1, 256), st.sampled_from(["u1", "u2", "u4", "u8"]), st.integers(0))
def test_codes_tell_known_patterns_from_unknown_ones(count: int, width: str, seed: int):
    draw = np.random.default_rng(seed)
    top = np.iinfo(width).max
    keys = np.unique(draw.integers(0, top, count, dtype=width, endpoint=True))
    codes = Codes(keys)
    assert codes.ranks(keys).tolist() == list(range(keys.size))
    other = draw.integers(0, top, 1000, dtype=width, endpoint=True)
    expected = other[~np.isin(other, keys)]
    assert codes.unknown(other).tolist() == expected.tolist()


@pytest.mark.parametrize("planes", PLANES, ids=str)
def test_planes_give_back_every_digit(planes: Any):
    digits = np.random.default_rng(0).integers(0, planes.base, 1001).astype(np.uint8)
    low, high = planes.pack(digits)
    assert low.nbytes + high.nbytes == planes.nbytes(1001)
    small = low[:, None] // planes.low.powers % planes.low.base
    large = high[:, None] // planes.high.powers % planes.high.base
    back = small.reshape(-1) + planes.low.base * large.reshape(-1)
    assert back[:1001].tolist() == digits.tolist()
    assert planes.bits == np.log2(planes.base)


def test_a_table_of_halves_takes_half_the_bytes():
    array = sparse((64, 80), 0, 256)
    halved = array.astype(np.float16).astype(np.float32)
    full, half = encode(array), encode(halved)
    assert full is not None
    assert half is not None
    assert_exact(half, halved)
    assert half.kind == "codes256"
    assert half.nbytes < full.nbytes - 400


def test_vectors_of_one_hash_are_told_apart():
    patterns = np.array([1, 2, 1, 2, 3, 4, 1, 2], np.uint32)
    found = vector_table(patterns, 2)
    assert found is not None
    table, ranks = found
    assert table[ranks].reshape(-1).tolist() == patterns.tolist()
    assert vector_table(np.arange(1200, dtype=np.uint32), 4) is None
    assert vector_table(patterns, 5) is None


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packing_gives_back_every_digit(packing: Any):
    digits = np.random.default_rng(0).integers(0, packing.base, 1001).astype(np.uint8)
    digits[:13] = packing.base - 1
    words = packing.pack(digits)
    assert words.size == packing.words(1001)
    back = words.astype(np.int64)[:, None] // packing.powers % packing.base
    assert back.reshape(-1)[:1001].tolist() == digits.tolist()
    assert words.min() >= 0


def test_census_counts_what_is_there():
    array = np.array([0, 0, 0, 1.5, -0.0, 0, 1.5], np.float32)
    census = Census(ArrayTensor(array), 17)
    assert census.codes is not None
    assert census.codes.keys.tolist() == [0, 0x3FC00000, 0x80000000]
    assert (census.default, census.stored) == (0, 3)
    assert census.steps().tolist() == [4, 1, 2]
    assert census.casts == (TensorProto.FLOAT16,)


# --- models ---------------------------------------------------------------------------


def perceptron(codes: int, zeros: float, sizes: tuple[int, ...]) -> onnx.ModelProto:
    """Return a stack of Gemm and Relu with biases, weights of so many zeros."""
    draw = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        weight = draw.standard_normal((fan_in, fan_out)).astype(np.float32)
        if codes:
            book = draw.standard_normal(codes).astype(np.float32)
            weight = book[draw.integers(0, codes, weight.shape)]
        weight[draw.random(weight.shape) < zeros] = 0
        bias = draw.standard_normal(fan_out).astype(np.float32)
        tensors.append(numpy_helper.from_array(weight, f"w{layer}"))
        tensors.append(numpy_helper.from_array(bias, f"b{layer}"))
        inputs = [value, f"w{layer}", f"b{layer}"]
        nodes.append(helper.make_node("Gemm", inputs, [f"h{layer}"]))
        nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
        value = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", sizes[0]])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", sizes[-1]])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


LENET = (784, 300, 100, 10)


@pytest.mark.parametrize(("codes", "limit"), [(16, 0.15), (0, 0.55)])
def test_lenet_300_100_of_90_percent_zeros_is_small(codes: int, limit: float):
    proto = perceptron(codes, 0.9, LENET)
    parameters = sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)
    assert parameters == 266_610
    data = Model.load(proto).to_bytes("auto")
    assert len(data) <= limit * parameters


@pytest.mark.parametrize("codes", [0, 16])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_shrinking_again_gives_the_same_bytes_and_plain_gives_the_original(
    codes: int, zeros: float
):
    proto = perceptron(codes, zeros, (70, 90, 50, 10))
    model = Model.load(proto)
    data = model.to_bytes("auto")
    assert model.to_bytes("auto") == data
    again = Model.load(data)
    assert again.to_bytes("auto") == data
    assert again.copy().to_bytes("auto") == data
    original = proto.SerializeToString(deterministic=True)
    assert again.to_bytes("plain") == original
    assert (len(data) < len(original)) == (codes > 0 or zeros > 0)


def test_a_loaded_decoder_is_a_weight_read_on_demand():
    proto = perceptron(16, 0.9, (70, 90, 10))
    model = Model.load(Model.load(proto).to_bytes("auto"))
    assert [node.op for node in model.graph.nodes] == ["Gemm", "Relu"] * 2
    weight = model.weight("w0")
    assert isinstance(weight.tensor, DecodedTensor)
    assert weight.shape == (70, 90)
    assert weight.tensor.encoded_nbytes < weight.nbytes / 10
    assert_same_bits(weight.read(), numpy_helper.to_array(proto.graph.initializer[0]))
    chunks = np.concatenate(list(weight.chunks(1000)))
    assert chunks.tobytes() == weight.read().tobytes()


def test_the_optimised_graph_and_the_outputs_are_those_of_the_plain_model(
    tmp_path: Path,
):
    draw = np.random.default_rng(0)
    weights = {
        "c0": draw.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "c1": draw.standard_normal((32, 16, 3, 3)).astype(np.float32),
        "s": draw.random(32).astype(np.float32) + 1,
        "z": draw.standard_normal(32).astype(np.float32),
    }
    for name in ("c0", "c1"):
        weights[name][draw.random(weights[name].shape) < 0.8] = 0
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 3, 12, 12] x) => (float[1, 32, 12, 12] y) {
      a = Conv<pads=[1,1,1,1]>(x, c0)
      b = Relu(a)
      c = Conv<pads=[1,1,1,1]>(b, c1)
      d = BatchNormalization(c, s, z, z, s)
      y = Relu(d)
    }
    """
    proto = onnx.parser.parse_model(text.replace("y) {", "y)\n{"))
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    model = Model.load(proto, check=False)
    files = {}
    outputs = {}
    x = draw.standard_normal((1, 3, 12, 12)).astype(np.float32)
    for storage in ("plain", "auto"):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / storage)
        options.log_severity_level = 4
        session = ort.InferenceSession(
            model.to_bytes(storage),  # type: ignore[arg-type]
            options,
            providers=["CPUExecutionProvider"],
        )
        outputs[storage] = session.run(None, {"x": x})[0]
        graph = onnx.load(tmp_path / storage).graph
        files[storage] = [
            (node.op_type, node.domain, len(node.input)) for node in graph.node
        ]
    assert files["auto"] == files["plain"]
    assert outputs["auto"].tobytes() == outputs["plain"].tobytes()


def test_a_weight_read_only_inside_a_subgraph_is_encoded_and_taken_back():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (bool b, float[1, 80] x) => (float[1, 80] y)
    {
      y = If(b) <
        then_branch = t () => (float[1, 80] p) { p = MatMul(x, w) },
        else_branch = e () => (float[1, 80] q) { q = Sub(x, x) }
      >
    }
    """
    proto = onnx.parser.parse_model(text)
    array = sparse((80, 80), 0.9, 16)
    proto.graph.initializer.append(numpy_helper.from_array(array, "w"))
    data = Model.load(proto).to_bytes("auto")
    assert len(data) < array.nbytes / 5
    options = ort.SessionOptions()
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(data, options, providers=providers)
    x = np.ones((1, 80), np.float32)
    y = session.run(None, {"b": np.array(True), "x": x})[0]
    np.testing.assert_allclose(y, x @ array, rtol=1e-5)
    again = Model.load(data)
    assert again.to_bytes("auto") == data
    assert again.to_proto("plain") == proto


def test_doc_strings_of_weights_are_not_lost():
    proto = perceptron(16, 0.9, (70, 90, 10))
    proto.graph.initializer[0].doc_string = "from the paper"
    data = Model.load(proto).to_bytes("auto")
    kept = [t for t in onnx.load_from_string(data).graph.initializer if t.name == "w0"]
    assert [t.doc_string for t in kept] == ["from the paper"]


def test_external_data_holds_encoded_weights_too(tmp_path: Path):
    proto = perceptron(16, 0.9, LENET)
    model = Model.load(proto)
    model.save(tmp_path / "m.onnx", external="always")
    again = Model.load(tmp_path / "m.onnx")
    assert isinstance(again.weight("w0").tensor, DecodedTensor)
    assert again.to_bytes("plain") == proto.SerializeToString(deterministic=True)


# --- decoders that nobody should trust ------------------------------------------------


def hostile(text: str, **tensors: Array) -> onnx.ModelProto:
    """Return a model that adds the weight ``w``, made by ``text``, to its input."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g (float x) => (float[N] y)\n{{ {text}\n y = Add(x, w) }}"
    )
    rename = {name: "~" + name[2:] for name in {
        value for node in proto.graph.node for value in [*node.input, *node.output]
    } if name.startswith("t_")}  # fmt: skip
    for node in proto.graph.node:
        names = [rename.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(names)
        names = [rename.get(name, name) for name in node.output]
        del node.output[:]
        node.output.extend(names)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name.replace("t_", "~"))
        for name, array in tensors.items()
    )
    return proto


def loaded(proto: onnx.ModelProto) -> Model:
    return Model.load(proto, check=False)


@pytest.mark.parametrize(
    ("text", "tensors"),
    [
        (
            "w = ConstantOfShape(t_a)",
            {"t_a": np.array([10**12])},
        ),
        (
            "t_c = ConstantOfShape(t_a) w = ScatterElements(t_c, t_i, t_v)",
            {
                "t_a": np.array([2**40]),
                "t_i": np.zeros(1, np.int32),
                "t_v": np.ones(1, np.float32),
            },
        ),
        (
            "t_c = Gather(t_i, t_i) t_d = Gather(t_c, t_i) w = Gather(t_v, t_d)",
            {
                "t_i": np.zeros((1500, 1500), np.int32),
                "t_v": np.ones(1, np.float32),
            },
        ),
        (
            "t_c = Range(t_i, t_k, t_j) w = Gather(t_v, t_c)",
            {
                "t_i": np.array(0, np.int32),
                "t_j": np.array(1, np.int32),
                "t_k": np.array(2**31 - 1, np.int32),
                "t_v": np.ones(1, np.float32),
            },
        ),
        (
            "t_c = Div(t_i, t_j) w = Gather(t_v, t_c)",
            {
                "t_i": np.ones(20, np.int32),
                "t_j": np.zeros((), np.int32),
                "t_v": np.ones(1, np.float32),
            },
        ),
        (
            "w = Reshape(t_v, t_s)",
            {"t_v": np.ones(6, np.float32), "t_s": np.array([4, 2])},
        ),
        ("w = Cast<to=8>(t_v)", {"t_v": np.ones(6, np.float32)}),
        ("w = NonZero(t_v)", {"t_v": np.ones(6, np.float32)}),
        ("w = Cast<to=1>(x)", {}),
        ("w = Gather(t_v, t_i)", {"t_v": np.ones(6, np.float32), "t_i": np.ones(3)}),
    ],
    ids=["fill", "scatter", "growth", "range", "by-zero", "reshape", "text", "operator",
         "input", "index-type"],
)  # fmt: skip
def test_what_is_no_decoder_of_ours_stays_as_it_is(
    text: str, tensors: dict[str, Array]
):
    proto = hostile(text, **tensors)
    model = loaded(proto)
    assert model.to_proto("plain") == proto
    assert not any(isinstance(w.tensor, DecodedTensor) for w in model.weights())


@pytest.mark.parametrize(
    ("text", "tensors"),
    [
        (
            "w = Gather(t_v, t_i)",
            {"t_v": np.ones(6, np.float32), "t_i": np.array([0, 6], np.int32)},
        ),
        (
            "t_c = ConstantOfShape(t_a) w = ScatterElements(t_c, t_i, t_v)",
            {
                "t_a": np.array([10]),
                "t_i": np.array([-11], np.int32),
                "t_v": np.ones(1, np.float32),
            },
        ),
        (
            "t_c = Div(t_i, t_j) w = Gather(t_v, t_c)",
            {
                "t_i": np.array([-3], np.int32),
                "t_j": np.array(2, np.int32),
                "t_v": np.ones(6, np.float32),
            },
        ),
    ],
    ids=["gather", "scatter", "negative-word"],
)
def test_a_broken_decoder_is_refused_when_it_is_read(
    text: str, tensors: dict[str, Array]
):
    model = loaded(hostile(text, **tensors))
    with pytest.raises(ModelError, match="decoder of 'w' is broken"):
        model.weight("w").read()


def test_an_endless_chain_is_left_alone_quickly():
    proto = hostile("w = Identity(t_n0)", t_v=np.ones(3, np.float32))
    chain = [
        helper.make_node("Identity", [f"~n{index + 1}"], [f"~n{index}"])
        for index in range(5000)
    ]
    chain.append(helper.make_node("Identity", ["~v"], ["~n5000"]))
    nodes = [*reversed(chain), *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert loaded(proto).to_proto("plain") == proto


def test_a_sparse_initializer_is_no_payload():
    proto = hostile("w = Cast<to=1>(t_v)")
    proto.graph.sparse_initializer.add(
        values=TensorProto(name="~v", dims=[0], data_type=TensorProto.FLOAT16),
        indices=TensorProto(name="i", dims=[0], data_type=TensorProto.INT64),
        dims=[10**12],
    )
    assert loaded(proto).to_proto("plain") == proto


def test_a_decoder_that_something_else_reads_too_stays_for_it():
    proto = hostile(
        "t_i = Cast<to=6>(t_w) w = Gather(t_v, t_i) z = Shape(t_i)",
        t_w=np.zeros(300, np.uint8),
        t_v=np.ones(1, np.float32),
    )
    shape = helper.make_tensor_value_info("z", TensorProto.INT64, [1])
    proto.graph.output.append(shape)
    model = loaded(proto)
    assert [node.op for node in model.graph.nodes] == ["Cast", "Shape", "Add"]
    assert model.weight("w").read().tolist() == [1.0] * 300


def test_recognising_twice_changes_nothing():
    model = Model.load(Model.load(perceptron(16, 0.9, (70, 90, 10))).to_bytes("auto"))
    before = model.to_bytes("auto")
    recognise(model.graph)
    assert model.to_bytes("auto") == before


@pytest.mark.slow
@pytest.mark.parametrize(("zeros", "codes"), [(0.5, 0), (0.9, 16), (0, 33), (0, 70)])
def test_large_weights_fold_too(tmp_path: Path, zeros: float, codes: int):
    array = sparse((4100, 4001), zeros, codes)
    encoding = encode(array)
    assert encoding is not None
    model = model_of(encoding, array, 17)
    assert_same_bits(run(model, "basic", tmp_path / "folded.onnx"), array)
    folded = onnx.load(tmp_path / "folded.onnx").graph
    assert {node.op_type for node in folded.node} <= {"Identity"}
    assert_same_bits(decode(encoding.nodes, encoding.initializers).read(), array)
