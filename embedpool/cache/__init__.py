"""The cache's layer on the disk. That in memory, and what models ask of both, is pool/cache.py."""
