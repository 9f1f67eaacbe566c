"""Benchmarks of the operators beside what a PyTorch user would write instead (docs/benchmarks.md)."""
