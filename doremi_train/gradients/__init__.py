"""Gradients of single examples without their materialisation: factors, products, and their
capture."""
