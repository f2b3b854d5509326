"""Child processes that cannot outlive their parent, and signals that end a command."""
