"""The SADMoE paper (arXiv 2310.04361) drawn again, figure by figure, on models that two CPU cores train: ``python -m bench.paper``."""
