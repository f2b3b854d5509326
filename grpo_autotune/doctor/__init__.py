"""Checks of the machine and of the installed packages: findings, each with a remedy."""
