"""Training: from a RunConfig to a GRPOTrainer, its data, rewards, checkpoints and log.

transformers and TRL load torchvision on import, which some installations cannot without help: it comes first, here, for
every module of this package.
"""

from grpo_autotune.seams.torchvision_compat import ensure_torchvision

ensure_torchvision()
