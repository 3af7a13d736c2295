"""Writers build the JSON replies and the events of streams for /v1/chat/completions and /v1/completions.

Each endpoint has a module with its writer. The function `sse.answer` calls the writer through the interface
`writer.Writer`.
"""
