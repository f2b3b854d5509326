"""Monitors of a training: rules over what it logs, and a watchdog of its stages."""
