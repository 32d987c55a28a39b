"""TorchServe on a model store: started, watched and stopped by us, without its launcher."""
