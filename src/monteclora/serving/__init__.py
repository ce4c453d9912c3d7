"""A client for servers that hold the mean and draws of a posterior as LoRA adapters: vLLM, llama.cpp's server."""

from monteclora.serving.client import Client, Served

__all__ = ["Client", "Served"]
