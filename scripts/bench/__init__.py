"""Benchmarks: `python -m scripts.bench.step` and the like; docs/performance.md has their figures."""
