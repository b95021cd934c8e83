"""From images to trees on a node, and who uses them. See :func:`stager.staging.stage.stage`."""
