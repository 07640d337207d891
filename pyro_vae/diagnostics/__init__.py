"""What a guide loses, and where."""

from pyro_vae.diagnostics import gradients

__all__ = ["gradients"]
