"""Tasks, items, batches and rows: the contract between the pool, its tasks and the drivers.

No thread, no HTTP, no torch. A task is a file, such as embed.py: it says how the inputs of a request become items, and
how the rows that come back become its answer. A driver names the tasks it can do in its facts.
"""
