"""What every server loads, to be loaded once."""

from importlib import import_module

from server.openmp import bound_spinning

bound_spinning()
for name in ("server.serve", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"):
    import_module(name)
