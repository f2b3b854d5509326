"""The types of the JSON files: probe, report, trial, search and receipt; free of torch."""
