"""Data sets and images, as TRL takes them."""
