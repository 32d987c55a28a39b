"""The archives of a model store behind plain ASGI, without TorchServe: the same requests, the same answers.

    marina serve --engine asgi (server.py)          extracts the archives, starts the front, watches it
    `- front.py: HTTP                               app.py: routes, token, limits;  model.py: queue, workers, retries
       `- worker.py, one process a worker           rows.py: bodies;  the archive's own handlers.worker does the rest

A request goes through the front as it came: what is in its body the worker finds out.
"""
