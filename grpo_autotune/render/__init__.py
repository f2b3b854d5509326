"""Reports as text for a terminal and as pages of HTML, from stored records alone."""
