"""Other frameworks' configurations and logs: read, converted, and tuned values written back."""
