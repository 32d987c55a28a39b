"""From a data set in the store to a promoted archive: the same step scripts on this machine and as Tekton Tasks.

    parameters   the one schema: of FILE.yaml, of the scripts' environment, of the Tekton Pipeline's params
    steps        which scripts there are, in order, and what each is told
    run          executes them here, one after the other, and goes on where it was stopped
    tekton       writes the same steps as Tekton Tasks and a Pipeline
    recipe, gate, check   what the scripts call; `check` says whether the parameters are right

The scripts are `docker/tekton/steps/*.sh`. They work in one folder, see a parameter as `$MARINA_<NAME>` only, and hand
on to each other through files:

    raw/              the data set as it was pushed            device        gpu or cpu: what trains
    data/             prepared                                 run/          the training, its recipe and export
    evaluation/       of the run, on the split held out        gate.txt      what the gate said
    archive.mar       what is served                           *.id          what was pushed, in the store
    weights/          to start from                            version       of the archive
"""
