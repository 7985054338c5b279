"""What fp32 matrix products run on: TF32 tensor cores or not. Set before the model is built, proved after libraries had their say."""

from __future__ import annotations

import torch

from launcher.errors import UsageError


def set_matmul_precision(tf32: bool) -> None:
    """cuDNN follows, although no model here has a convolution: its own default would be TF32."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def require_matmul_precision(tf32: bool) -> None:
    """Errors: UsageError when torch would compute in another precision than the plan's."""
    found = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    if found != (tf32, "high" if tf32 else "highest"):
        message = f"torch has TF32 {'on' if found[0] else 'off'} and precision {found[1]}: a library changed it"
        raise UsageError(message, code="tf32", key="training.tf32")
