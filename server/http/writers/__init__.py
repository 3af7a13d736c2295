"""The wire shapes of the generating endpoints, one module each; `writer.Writer` is what `sse.answer` asks of them."""
