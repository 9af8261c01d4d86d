"""The checkpoint protocol of Hugging Face: the only package that knows it.

``import moeify`` calls `register`, which is all that is needed for ``from_pretrained`` of a converted checkpoint. No module here imports
transformers before it is used.
"""

from .registration import register as register
