"""The HTTP API beside plain vLLM's, on requests that schemathesis makes up: `make fuzz-http`."""
