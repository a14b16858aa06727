"""For other engines: folders and files that transformers, llama.cpp and vLLM open."""
