"""Embedpool measured against its references on one machine: `python -m benchmarks.run --help`."""
