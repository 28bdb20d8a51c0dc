"""Purify backdoored image classifiers, and find the poisoned training images."""

__version__ = "0.1.0"
