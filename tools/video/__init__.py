"""Videos, cameras, network streams and the screen: read, drawn on, tracked and written.

VideoFile, stream -> Frame -> annotate (asks a detector, in order) -> Overlay -> VideoWriter, JSON Lines
"""
