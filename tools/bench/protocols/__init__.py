"""Every way to ask for detections over the network, side by side. Run by `compare`."""
