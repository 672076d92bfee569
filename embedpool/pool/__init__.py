"""Between HTTP and the drivers: requests become items, items become batches. Standard library and numpy only."""
