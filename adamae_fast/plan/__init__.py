"""``adamae-fast plan``: what a run takes before it is paid for, and a rehearsal of its set-up without a GPU."""
