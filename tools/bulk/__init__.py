"""`marina detect-bulk`: a model over millions of pictures, on one machine or a Ray cluster.

    SRC -> listing, in shards -> Ray Data -> workers -> one part a shard -> coco.json, failed.jsonl, summary.json

The folder or prefix DST is all that a run knows:

    manifest.json            what is done, with which archive and options; written once, first
    listing/00000.jsonl      the pictures found, cut into numbered shards; later runs add files for what is new
    parts/000000.parquet     the answers to one shard; there whole, or not at all
    coco.json, failed.jsonl, summary.json    put together from all parts when none is missing

Each of the first three is written once and never changed, and what is in it follows from the ones before. So a run that
was killed goes on with the shards whose parts are missing, and two runs at once do no harm: what both make is the same.
"""
