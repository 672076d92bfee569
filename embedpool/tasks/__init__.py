"""What a model is asked and what it gives: items, batches, rows, and what a driver has to do.

No thread, no HTTP, no torch. A task is a file, such as embed.py: it says how the inputs of a request become items, and
how the rows that come back become its answer. A driver names the tasks it can do in its facts.
"""
