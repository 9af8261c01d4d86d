"""Converted and thinned models behind the OpenAI-compatible server of transformers.

`presets` is which rules run for whose tokens, `app` the server. Nothing here is imported by ``import moeify``.
"""
