"""ONNX files of the step loop, and the folder that onnxruntime and transformers.js load."""
