"""Only the models; nothing is trained here."""
