"""Training: a GRPOTrainer made from a configuration, with its data, rewards, checkpoints and log.

transformers and TRL load torchvision on import, which some installations cannot without help, and PEFT, which logs a
line that no run needs: both are seen to first, here, for every module of this package.
"""

from grpo_autotune.seams.torchvision_compat import ensure_torchvision
from grpo_autotune.train.runs.quiet import drop_log_lines

ensure_torchvision()
drop_log_lines()
