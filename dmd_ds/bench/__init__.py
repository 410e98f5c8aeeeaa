"""What this project costs: time, memory and bytes between ranks, as ratios that hold on any machine. `tools/bench.py` is the door.

A module a part. `measure(...)` starts the ranks and returns numbers that JSON takes, `on_rank(...)` is what each of them does,
`table(...)` is what a person reads.
"""
