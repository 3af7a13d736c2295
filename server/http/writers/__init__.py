"""Writers build the JSON replies and the events of streams for /v1/chat/completions and /v1/completions.

The writer of each endpoint is in a module of its own. The function `sse.answer` calls the writer through the interface
`writer.Writer`.
"""
