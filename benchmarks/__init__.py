"""What is measured and never asserted: ``python -m benchmarks [group or bar …]``.

A group is a module with its bars: :mod:`benchmarks.core` needs nothing but the core,
:mod:`benchmarks.llamacpp` the llama.cpp plugin and a real model,
:mod:`benchmarks.hf_transformers` the Transformers plugin and the same model as safetensors.
:mod:`benchmarks.harness` has the arithmetic and says how a bar is written.
"""
