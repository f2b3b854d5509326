"""Rewards of other frameworks in the form of TRL's, their files called as they are."""
