"""From an environment to images on shared storage. See :func:`stager.packing.pack.pack`."""
