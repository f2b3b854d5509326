"""Advice of a report: changes to make, and the seconds that each is predicted to save."""
