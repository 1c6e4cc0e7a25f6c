"""Quantize, evaluate and run ByteDance Lance: the library, free of any orchestrator."""

__version__ = "0.1.0"
