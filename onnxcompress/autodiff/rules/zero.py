"""Operators through which no gradient passes: their outputs are counts, indices, truth values or steps."""

from __future__ import annotations

from onnxcompress.autodiff.rule import zero

zero("Constant", "ConstantOfShape", "EyeLike", "Range", "Shape", "Size", "OneHot")
zero("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
zero("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix")
zero("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsInf", "IsNaN")
zero("Not", "And", "Or", "Xor", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")
zero("ArgMax", "ArgMin", "NonZero", "NonMaxSuppression", "Hardmax")
zero("Floor", "Ceil", "Round", "Sign")
zero("SequenceLength", "OptionalHasElement", "TfIdfVectorizer", "StringNormalizer", "StringSplit", "StringConcat")
zero("RegexFullMatch", "ImageDecoder")
