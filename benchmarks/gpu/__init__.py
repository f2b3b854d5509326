"""The stages of `benchmarks.gpu_check`, a module each."""
