"""An HTTP server in OpenAI's protocol, on the native engine or in front of vLLM."""
