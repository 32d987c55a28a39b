"""Captured pictures to Label Studio, and what annotators made of them back into a data set.

    setup   a project whose labels are the classes of an archive or data set
    push    captured items -> tasks with our detections as predictions
    pull    annotations -> a data set in Marina's layout, with a record of what came from where

What was pushed is known by the id of the captured item, which stands in the task's data: nothing is kept beside it, so
that any machine can go on where another stopped. All calls are those of Label Studio's documented REST API, by httpx.
"""
