"""Time: what a piece of a client's work takes, and in which order answers come back.

    settings      the sections [clock] and [schedule]
    durations     seconds of every client's work, from distributions or a file
    devices       the file's side of it: a trace of speeds and bandwidths
    windows       when clients are there
    files         tables of numbers, read from CSV or Parquet
    lookalikes    files that look like traces of the field
    exchange      a synchronous exchange: who answers in time, and what it takes
    queue         the buffered schedule: work in flight, in order of its end
    staleness     the weight of an update by the age of its model
    arrivals      arrivals.parquet: every piece of work, when it was sent and was back
    replay        a schedule that follows such a file
    fit           a [clock] from such a file

Time is simulated time, in whole microseconds since the run's start.
"""
