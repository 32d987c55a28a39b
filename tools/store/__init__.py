"""Archives, weights, runs and data sets in an S3 bucket or a folder.

    blobs/<sha256>[.mar]                      content, under the checksum of its bytes
    pushes/<id>.json                          a push under way: the manifest that it is about to write
    manifests/<kind>/<name>/<id>.json         a push that is done: there from one moment to the next, or not at all
    tags/<kind>/<name>/<tag>/<number>.json    every move of a tag; the highest number is the truth
    keys/<id>.json                            a public key; an archive must be signed by one of them to be production
    condemned/<id>.json                       the blobs that a `gc` under way is about to remove

    push     marker -> blobs, each checked by the server -> manifest -> marker removed
    pull     manifest -> blobs to temporary names, checked -> renamed
    promote  evidence, checksums, version -> the next number of the tag
    gc       markers of old pushes closed -> blobs that nothing refers to condemned -> looked for again -> removed

Whatever must not happen twice is a create-only write (S3: `If-None-Match: *`, a folder: a hard link): a manifest, a
move of a tag, and a `gc` that closes a push by taking the place of its manifest. So whoever comes second knows it, and
a push that was given up can never become visible later. Nothing else has to be exclusive: blobs of one name are equal,
and one that was cut off goes on with the parts that are there.

A push writes its marker before it looks at what is condemned, and `gc` condemns before it looks at markers a second
time: one of the two sees the other, so that no blob is removed that somebody relies on.

An id is the time of the push in UTC, to the microsecond, and 64 random bits: its order as text is that of time.
"""
