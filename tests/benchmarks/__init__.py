"""Measurements, each a command of its own; ``python -m tests.benchmarks`` runs all into docs/benchmarks.md."""
