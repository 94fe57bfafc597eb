"""Data: conversations, texts and prompts; chat templates; endpoints that answer."""
