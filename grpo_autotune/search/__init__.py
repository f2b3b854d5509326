"""The search: which configuration to try next within a budget, and which one to recommend."""
