"""Quantize, evaluate and run ByteDance Lance: the library, free of any orchestrator.

lance_quant.swap_linears(model, folder)     # a 4-bit model from any module tree with upstream's names
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "swap_linears":  # not before it is asked for: it needs torch
        from lance_quant.runtime.swap import swap_linears

        return swap_linears
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
