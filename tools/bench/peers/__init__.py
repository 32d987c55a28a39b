"""What people serve a detector with instead, each as its own documentation shows it. Run by `compare`.

Each reads `peer.json` in its working folder, listens on loopback, takes the bytes of a picture and answers
{"detections": [{"label", "score", "box"}]}. None uses code of ours but the one network that it serves.
"""
