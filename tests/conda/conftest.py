"""The fixtures, for the tests of this directory."""

from __future__ import annotations

from .fixtures import conda_channel, conda_clone, conda_env, pixi_like_env

__all__ = ["conda_channel", "conda_clone", "conda_env", "pixi_like_env"]
