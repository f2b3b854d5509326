"""Rewards that wait on a network."""
