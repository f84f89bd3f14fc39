"""The framework-agnostic core: pure torch, no host, no user interface, no global state."""
