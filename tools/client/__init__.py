"""A client of served models: pictures, folders, videos and live sources, over every protocol.

from tools.client.client import Client

with Client("http://127.0.0.1:8080", "shapes", token=token) as client:
    for answer in client.predict_many(["photos/", "door.mp4"]):
        print(answer.source, answer.error or answer.detections)
"""
