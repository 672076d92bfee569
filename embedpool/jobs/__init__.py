"""Work that outlives a request: files of texts, in windows, on a pool or a server."""
