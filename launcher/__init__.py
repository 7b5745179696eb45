"""The `baton` command: one process of each kind, a local cluster, a client and a demo.

Knows nothing about models, queues or protocols beyond their public clients; imports what a
subcommand needs inside that subcommand, so that `baton --help` stays quick.
"""
