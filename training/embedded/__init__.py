"""How the embedded "emoji" model in `src/embedded/` was made; each stage is one command (see README.md)."""
