"""The gateway: OpenAI-compatible HTTP on the request path. No disk, lock or NATS between request and answer."""
