"""Spans of OpenTelemetry for requests, with `--otlp-traces-endpoint`."""
