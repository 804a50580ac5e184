"""Netloader's server and client under random faults for a while; whatever arrives is compared byte for byte.

    python -m tools.soak                    # ten minutes
    python -m tools.soak --seconds 60 --seed 7

Two server processes, "lasting" and "mortal", serve synthetic weights, each on one listener that is open to everybody,
one that wants a token, and one with TLS. Now and then they replace their weights by others. Every other time they
suspend serving before that, which no client may prevent. The mortal server is killed and started again. Worker
processes do tasks, each chosen by chance:

    fetch       takes the weights from both servers in some order, with or without VERIFY
    killed      the same, but the process is killed in the middle
    cut         connections break after some bytes, by a proper end or a reset
    corrupted   bytes change on their way
    slow        bytes pass slowly, and then connections break
    stranger    a client with a wrong token, without one, or without TLS: it must get nothing
    flood       many connections that are silent, send garbage, ask for nothing but the status, or begin a session only
                to keep asking, take nothing, or give up with many words; half of them do not read

After each round of 30 seconds all is quiet: no task runs, and the lasting server must have no sessions left. Neither it
nor the workers may have more descriptors, threads and private memory than after the first two rounds, apart from a
tolerance.

The exit status is 1 for wrong bytes, a stranger that got weights, growth, a task or server that does not come to its
end, or a kind of fetch of which none succeeded. `--seed` chooses the same tasks and faults again; when they hit is up
to the machine.

`conductor` drives all processes, and `servers` and `tasks` are what runs in them. `watching` holds what is measured and
counted.
"""
