"""dmd_ds: few-step video generators from Wan2.1, distilled with DMD2 on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
