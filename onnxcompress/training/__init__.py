"""Training by stock ONNX Runtime: the step is an ordinary ONNX graph of standard operators, built from the model."""
