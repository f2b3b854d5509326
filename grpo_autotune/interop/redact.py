"""Passwords, keys and tokens in a source, taken out before anything of it is shown or written."""
