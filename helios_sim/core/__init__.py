"""The only serving loop: state, schedule, depths, price, commit and triggers as functions over records.

`advance` takes the turns of one replica and calls the others. All of it runs as plain Python, and as machine code
where a run is long enough to pay for compiling (`machine`): the same functions, to the same bits. Live serving calls
the same scheduling and the same commit around an iteration that really runs.
"""
