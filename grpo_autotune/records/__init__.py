"""Every frozen type that is written as JSON, free of torch."""
