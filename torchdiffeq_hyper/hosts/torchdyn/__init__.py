"""The torchdyn host, which waits for the user's import of torchdyn."""
