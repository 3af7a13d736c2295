"""Records spans of OpenTelemetry for requests, if the option `--otlp-traces-endpoint` is given."""
