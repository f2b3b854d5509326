"""A file of another framework to a `RunConfig`, from reading to the record of what became of it."""
