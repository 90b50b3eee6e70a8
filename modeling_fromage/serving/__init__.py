"""Conversations with a model for many people at once, and a page in the browser that holds them."""
