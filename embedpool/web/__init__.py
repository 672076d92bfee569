"""The outermost ring: HTTP to a request and back. Knows no thread, no queue, no driver."""
