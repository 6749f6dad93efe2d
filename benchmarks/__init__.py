"""kernelab beside its peers: ``pytest benchmarks --benchmark-only`` and ``python benchmarks/memory/<subject>.py``."""
