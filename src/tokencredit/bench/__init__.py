"""The benchmark of credit: every method against the exact credit and the exact gradient.

`run` goes through the cells, `cell` measures one: `problem` (task and model), `sampling`, `entries` (which pipelines),
`measure` (gradients, within the bound of `memory`), `figures` (what the table shows), `show` (what the page adds).
"""
