"""Makes the generated parts of the pages; not part of the wheel."""
