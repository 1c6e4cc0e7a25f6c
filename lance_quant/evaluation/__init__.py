"""How close the 4-bit model comes to bf16: baseline, comparison, metrics, report."""
