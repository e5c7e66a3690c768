"""Operators of ONNX in TensorRT's parser: onnx-tensorrt docs/operators.md for TensorRT 10.1 (read, not run).

What later versions added may be refused here by mistake; what is taken here was taken in 10.1.
"""

from __future__ import annotations

from onnxcompress.targets.base import Limit

INTEGER = frozenset({"DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"})
UNSUPPORTED = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
        "BlackmanWindow", "Col2Im", "CenterCropPad", "Compress", "ConcatFromSequence", "DFT", "Det", "HammingWindow",
        "HannWindow", "ImageDecoder", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial",
        "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "STFT",
        "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
        "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit",
        "TfIdfVectorizer", "Unique",
    }
)  # fmt: skip

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip

LIMITS = (
    *(Limit(name, constant=(1,)) for name in (*_REDUCTIONS, "CumSum", "Squeeze", "Unsqueeze")),
    Limit("Slice", constant=(3,)),
    Limit("Pad", constant=(3,)),
    Limit("OneHot", constant=(1,)),
    Limit("MaxPool", attributes=(("dilations", (1,)),), outputs=1),
    Limit("AveragePool", attributes=(("dilations", (1,)),)),
    Limit("LpPool", attributes=(("dilations", (1,)),)),
    Limit("BatchNormalization", attributes=(("training_mode", (0,)),), outputs=1),
    Limit("LayerNormalization", outputs=1),
    Limit("LSTM", attributes=(("input_forget", (0,)), ("layout", (0,)))),
    Limit("ScatterND", attributes=(("reduction", ("none",)),)),
    Limit("TopK", attributes=(("sorted", (1,)),)),
    Limit("Dropout", constant=(2,)),
    Limit(
        "Resize",
        attributes=(
            (
                "coordinate_transformation_mode",
                ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
            ),
            ("mode", ("nearest", "linear")),
            ("nearest_mode", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
        ),
    ),
)
