"""What can be exported, by name: for the command line, which imports nothing heavy."""

TARGETS = {
    "hf": "the plain folder",
    "draft": "the first E layers as a smaller model",
    "gguf": "model and draft for llama.cpp",
    "vllm": "model and draft for vLLM, with the command",
    "custom-generate": "a folder for transformers' generate",
}
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_1")  # of matrices in a GGUF file
