"""Pushing: images are sent to nodes ahead of the jobs that will use them, by ssh.

::

    pusher --ssh--> `stager receive` on each node: verifies, puts it into the store, extracts
    or, as a tree: some nodes, which hand on what arrives to their share of the others

Read :mod:`stager.push.sending` first, then :mod:`stager.push.receiving`. What they say to each
other is in :mod:`stager.push.protocol` and ``docs/formats/push.md``.
"""
