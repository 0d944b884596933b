"""The chat page at `/`, made with gradio. It calls this server's own API."""
