"""Rollout fidelity: whether the engine samples from the model that is trained."""
