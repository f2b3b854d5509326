"""Branches: rows of several objectives in one run, each with its own weight of the KL term, rewards and evaluation."""
