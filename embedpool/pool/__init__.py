"""Between HTTP and the drivers: a request becomes jobs, jobs become batches. Standard library and numpy only."""
