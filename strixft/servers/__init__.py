"""Local model servers that speak the OpenAI protocol: found, started, asked."""
