"""Reports as text for a terminal, from the report alone."""
