"""Writers build the replies and events of the generating endpoints, one module for each endpoint.

`sse.answer` calls them through the interface `writer.Writer`.
"""
