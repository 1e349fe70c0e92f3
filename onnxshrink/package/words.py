"""What stands in most graphs: the dictionary that a package's graph is deflated with.

Part of the format: it never changes. The most frequent words stand last (RFC 1951
reaches back 32 KiB, and near matches are shorter).
"""

from __future__ import annotations

__all__ = ["WORDS"]

WORDS = (
    b"SkipLayerNormalization FusedMatMul com.microsoft.nchwc MatMulNBits QLinearConv G"
    b"roupNormalization InstanceNormalization RotaryEmbedding HardSwish Einsum Scatter"
    b"ND GatherND NonZero Resize coordinate_transformation_mode half_pixel nearest_mod"
    b"e cubic_coeff_a round_prefer_floor linear TopK NonMaxSuppression ConvTranspose o"
    b"utput_padding AveragePool count_include_pad ceil_mode LeakyRelu HardSigmoid Soft"
    b"plus Erf Floor Mod Where Equal Greater Less And Not ReduceSum ReduceMax ReduceMe"
    b"an keepdims noop_with_empty_axes ArgMax select_last_index Expand Tile Range CumS"
    b"um exclusive reverse ScatterElements GatherElements LSTM GRU hidden_size directi"
    b"on bidirectional Loop If then_branch else_branch then_graph else_graph cond body"
    b" Split num_outputs Slice starts ends steps axes Squeeze Unsqueeze Gather Shape s"
    b"tart end Cast Concat Pad constant mode Transpose perm ConstantOfShape Constant v"
    b"alue Identity Dropout ratio training_mode Sqrt Pow Div Sub Neg Exp Log Abs Tanh "
    b"Sigmoid Gelu approximate Clip min max Flatten Softmax LayerNormalization stash_t"
    b"ype BatchNormalization epsilon momentum GlobalAveragePool MaxPool storage_order "
    b"DynamicQuantizeLinear MatMulInteger ConvInteger com.microsoft DequantizeLinear b"
    b"lock_size QuantizeLinear axis saturate _quantized _zero_point _scale running_mea"
    b"n running_var .self_attn.q_proj .k_proj pytorch 2.\x12\x07pytorch\x1a\x05 main_g"
    b"raph torch_jit tf2onnx skl2onnx onnxshrink.pipeline onnxshrink.version /Constant"
    b"_output_0 /Add_output_0 input_ids attention_mask token_type_ids last_hidden_stat"
    b"e /MatMul_output_0 embeddings.word_embeddings .attention.self.query.weight .dens"
    b"e.weight LayerNorm /layers.0/ /Relu_output_0 /Conv_output_0 onnx::Conv_ onnx::Ma"
    b"tMul_ \x08\x08\x12\x00:\n\x08input\x12\x08output image input logits labels outpu"
    b"t_0 batch height width N\x12\x08\n\x06\n\x04\x08\x01\x12\x00\n\x05batch\n\x02"
    b'\x08\x01"\x04MatMul"\x03Add"\x03Mul"\x07Reshape*\x10\n\tallowzero\x18\x00'
    b'\xa0\x01\x02"\x04Relu"\x04Conv*\x0f\n\x08dilations@\x01@\x01\xa0\x01\x07*\x0c'
    b"\n\x05group\x18\x01\xa0\x01\x02*\x12\n\x0ckernel_shape@\x03@\x03\xa0\x01\x07*"
    b"\x11\n\x04pads@\x01@\x01@\x01@\x01\xa0\x01\x07*\x10\n\x07strides@\x01@\x01\xa0"
    b'\x01\x07*\x17\n\x08auto_pad"\x06NOTSET\xa0\x01\x03"\x04Gemm*\x0f\n\x05alpha'
    b"\x15\x00\x00\x80?\xa0\x01\x01*\x0e\n\x04beta\x15\x00\x00\x80?\xa0\x01\x01*\r\n"
    b"\x06transA\x18\x00\xa0\x01\x02*\r\n\x06transB\x18\x01\xa0\x01\x02B\n\n\x00\x10"
    b"\x11B\x04\n\x00\x10\x15J\x04\x08\x01\x10.bias\x08\x01\x10\x01B\x0bconv1.weightfc"
    b"1.weight.weight*\x12\x08"
)
