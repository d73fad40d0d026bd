"""Exported programs as an exchange form.

The content is a `torch.export.ExportedProgram` in inference mode, its tensors under the user's names. What is to be
rounded is, as torch's own quantization flow leaves it, a pair ``quantized_decomposed.quantize_per_tensor`` and
``dequantize_per_tensor`` on int8; weights are stored as int8 and dequantized. Values that only move keep their grid by
a further pair. Where ranges are found at run time, what is multiplied by weights passes
``choose_qparams_per_token_asymmetric``, ``quantize_per_token`` and ``dequantize_per_token``. The batch, where it is
free, is so up to `LARGEST_BATCH`; other sizes are the example's.
"""

from __future__ import annotations

LARGEST_BATCH = 1024
"""Runtimes that plan their memory need a bound."""
