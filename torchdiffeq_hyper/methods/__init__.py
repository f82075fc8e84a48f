"""The registered methods, and the plugins that add them."""
