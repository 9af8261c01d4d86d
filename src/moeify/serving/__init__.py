"""Converted and thinned models behind the OpenAI-compatible server of transformers.

`rules` is which rules run for whose tokens, `sampling` how these are drawn, `app` the server, `config` its options. Nothing here is
imported by ``import moeify``, and `app` only by who serves.
"""

from .config import ServeConfig as ServeConfig
