"""Servers on a model store: started, watched and stopped by us. TorchServe goes without its launcher."""

ENGINES = ("torchserve", "asgi")
