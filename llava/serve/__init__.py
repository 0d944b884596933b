"""An HTTP server with an OpenAI-compatible API. `app.create` builds the application, `server.run` serves it."""
